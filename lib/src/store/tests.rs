//! Publishing, and what a crash at any point of it leaves.
//!
//! A crash is simulated by doing the steps up to it and then opening the directory anew: the steps
//! are separate methods, and what `serve` finds is what a process that died there leaves.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::places::read_about;
use super::*;
use crate::delta::{FileMeta, FileName};
use crate::page::PageSize;
use crate::wire::{BlockId, Layout};

const PEER: [u8; 32] = [7; 32];

fn page_size() -> PageSize {
    PageSize::new(4096).unwrap()
}

struct Place {
    dir: TempDir,
    store: Store,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        Self { dir, store }
    }

    /// Opens the directory as the next process would, and tidies up.
    fn restart(&mut self) {
        self.store = Store::open(self.dir.path()).unwrap();
        drop(self.store.serve().unwrap());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A stage with one file `text` that says `text`.
    fn stage(&self, name: &str, text: &str) -> (Stage, Vec<FileMeta>, Vec<Digest>) {
        let stage = self.store.stage(&PEER, name, page_size()).unwrap();
        fs::write(stage.files().join("text"), text).unwrap();
        let name = FileName::new("text").unwrap();
        let meta = FileMeta::new(name, 0o644, text.len() as u64, page_size());
        (stage, vec![meta], vec![Digest::of(text.as_bytes())])
    }

    fn publish_from(&self, base: Option<u64>, name: &str, text: &str) -> Record {
        let (stage, files, digests) = self.stage(name, text);
        let published = self
            .store
            .publish(
                stage,
                new_set(name, text, base),
                &files,
                digests.into_iter(),
            )
            .unwrap();
        self.store.tidy(Some(name), 0).unwrap();
        self.store.drop_partials(&PEER, name).unwrap();
        published.record
    }

    fn publish(&self, name: &str, text: &str) -> Record {
        self.publish_from(None, name, text)
    }

    fn text(&self, place: &str) -> Option<String> {
        fs::read_to_string(self.path(place).join("text")).ok()
    }

    /// What must hold at any time that nobody is at work.
    fn check(&self) {
        let records = self.store.records().unwrap();
        for record in &records {
            let directory = self
                .store
                .directory_of(record)
                .expect("each record has files");
            assert!(self.store.is_sound(record, &records), "{record:?}");
            let link = fs::read_link(directory.join("parent")).ok();
            assert_eq!(link.is_some(), record.base.is_some(), "{record:?}");
            if let Some(base) = record.base {
                let base = records
                    .iter()
                    .find(|it| it.id == base)
                    .expect("a base stays");
                let led_to = fs::read_to_string(directory.join("parent/text")).unwrap();
                assert_eq!(Digest::of(led_to.as_bytes()), base.root, "{record:?}");
            }
        }
        assert_eq!(self.names("stage"), Vec::<String>::new());
        for base in self.names("base") {
            assert!(
                records.iter().any(|it| it.id.to_string() == base),
                "base/{base}"
            );
        }
        assert_eq!(self.names("sets").len(), records.len());
    }

    fn names(&self, part: &str) -> Vec<String> {
        let entries = fs::read_dir(self.store.state_path(part)).unwrap();
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
        entries
            .map(|entry| name(entry).into_string().unwrap())
            .collect()
    }
}

fn new_set(name: &str, text: &str, base: Option<u64>) -> NewSet {
    NewSet {
        name: Some(name.to_owned()),
        peer: PEER,
        names_are_owned: false,
        root: Digest::of(text.as_bytes()),
        layout: Layout::Faithful,
        page_size: page_size(),
        completeness: "complete".to_owned(),
        base,
        keep_link: None,
        image_bytes: text.len() as u64,
        succeeds: None,
        tracked: false,
    }
}

fn ancestor(text: &str, base: Option<u64>, link: Option<&str>) -> NewSet {
    NewSet {
        name: None,
        keep_link: link.map(str::to_owned),
        ..new_set("", text, base)
    }
}

fn with_link(set: NewSet, link: &str) -> NewSet {
    NewSet {
        keep_link: Some(link.to_owned()),
        ..set
    }
}

/// Publishes with the kept link `link`.
fn publish_linked(place: &Place, name: &str, text: &str, base: u64, link: &str) -> PublishedSet {
    let (stage, files, digests) = place.stage(name, text);
    let new = with_link(new_set(name, text, Some(base)), link);
    place
        .store
        .publish(stage, new, &files, digests.into_iter())
        .unwrap()
}

#[test]
fn the_same_name_again_is_a_new_generation() {
    let place = Place::new();
    for (generation, text) in (1..).zip(["first", "second", "third"]) {
        assert_eq!(place.publish("web", text).generation, generation);
        assert_eq!(place.text("web").unwrap(), text);
        place.check();
    }
    assert_eq!(
        place.store.records().unwrap().len(),
        1,
        "nothing needs the others"
    );
    place.store.remove("web").unwrap();
    assert_eq!(place.text("web"), None);
    place.check();
    let missing = place.store.remove("web").unwrap_err();
    assert!(matches!(missing, StoreError::NoSuchSet(_)));
}

#[test]
fn superseded_generations_are_kept_as_many_as_asked() {
    let place = Place::new();
    for text in ["a", "b", "c", "d"] {
        let (stage, files, digests) = place.stage("web", text);
        let new = new_set("web", text, None);
        place
            .store
            .publish(stage, new, &files, digests.into_iter())
            .unwrap();
    }
    for (keep, left) in [(u64::MAX, 4), (2, 3), (1, 2), (0, 1)] {
        place.store.tidy(Some("web"), keep).unwrap();
        assert_eq!(place.store.records().unwrap().len(), left, "keep {keep}");
        place.check();
    }
}

#[test]
fn a_generation_stays_while_another_set_builds_on_it() {
    let place = Place::new();
    let base = place.publish("1", "base");
    place.publish_from(Some(base.id), "2", "child");
    place.publish("1", "another");
    place.check();
    assert_eq!(place.store.records().unwrap().len(), 3);
    assert_eq!(place.text("2/parent").unwrap(), "base");
    place.store.remove("2").unwrap();
    place.store.tidy(Some("1"), 0).unwrap();
    place.check();
    assert_eq!(place.store.records().unwrap().len(), 1);
    assert_eq!(place.names("base"), Vec::<String>::new());
}

#[test]
fn a_kept_link_is_moved_before_its_name_leads_elsewhere() {
    for by_removal in [false, true] {
        let place = Place::new();
        let base = place.publish("1", "base");
        let published = publish_linked(&place, "2", "child", base.id, "../1");
        assert_eq!(published.notes, Vec::<String>::new());
        assert_eq!(
            fs::read_link(place.path("2/parent")).unwrap(),
            Path::new("../1")
        );
        // Its operator gave it a better name.
        fs::rename(place.path("2"), place.path("two")).unwrap();
        if by_removal {
            place.store.remove("1").unwrap();
        } else {
            place.publish("1", "another");
        }
        assert_eq!(place.text("two/parent").unwrap(), "base");
        place.check();
    }
}

#[test]
fn an_ancestor_keeps_no_link_to_a_name() {
    let place = Place::new();
    place.publish("other", "something else");
    let base = place.publish("1", "base");
    let (stage, files, digests) = place.stage("2", "middle");
    let new = ancestor("middle", Some(base.id), Some("../1"));
    let middle = place
        .store
        .publish(stage, new, &files, digests.into_iter())
        .unwrap();
    place.publish_from(Some(middle.record.id), "3", "last");
    assert_eq!(place.text("3/parent/parent").unwrap(), "base");
    place.check();
}

#[test]
fn chains_that_use_the_same_names_do_not_meet() {
    let place = Place::new();
    for workload in ["web", "db"] {
        let mut base = None;
        for name in ["1", "2", "3"] {
            let text = format!("{workload} {name}");
            let id = match base {
                Some(base) => {
                    let link = format!("../{}", name.parse::<u32>().unwrap() - 1);
                    publish_linked(&place, name, &text, base, &link).record.id
                }
                None => place.publish(name, &text).id,
            };
            place.store.tidy(Some(name), 0).unwrap();
            base = Some(id);
            place.check();
        }
        assert_eq!(
            place.text("3/parent/parent").unwrap(),
            format!("{workload} 1")
        );
    }
}

#[test]
fn numbers_are_not_given_twice() {
    let place = Place::new();
    let first = place.publish("a", "a");
    place.store.remove("a").unwrap();
    assert!(place.publish("b", "b").id > first.id);
}

#[test]
fn foreign_directories_and_other_peers_sets_are_left_alone() {
    let place = Place::new();
    fs::create_dir(place.path("mine")).unwrap();
    fs::write(place.path("file"), "").unwrap();
    symlink("/", place.path("link")).unwrap();
    for name in ["mine", "file", "link"] {
        let (stage, files, digests) = place.stage(name, "text");
        let refused = place.store.publish(
            stage,
            new_set(name, "text", None),
            &files,
            digests.into_iter(),
        );
        assert!(matches!(refused, Err(StoreError::Foreign(_))), "{name}");
        assert!(place.store.check_may_publish(name, &PEER, false).is_err());
    }
    assert_eq!(place.names("partial").len(), 3, "what arrived is kept");
    assert_eq!(place.names("stage").len(), 0);
    place.publish("web", "text");
    place
        .store
        .check_may_publish("web", &[1; 32], false)
        .unwrap();
    let refused = place.store.check_may_publish("web", &[1; 32], true);
    assert!(matches!(refused, Err(StoreError::NotYours(_))));
}

/// Numbers of inodes are given again, at once on many file systems.
#[test]
fn a_directory_that_replaced_a_removed_set_is_not_taken_for_it() {
    let place = Place::new();
    place.publish("a", "received");
    for _ in 0..50 {
        fs::remove_dir_all(place.path("a")).unwrap();
        fs::create_dir(place.path("a")).unwrap();
        assert_eq!(place.store.current("a").unwrap(), None);
    }
}

#[test]
fn only_one_may_serve_and_only_what_is_one_may_be_opened() {
    let place = Place::new();
    let lock = place.store.serve().unwrap();
    let second = Store::open(place.dir.path()).unwrap();
    assert!(matches!(second.serve(), Err(StoreError::Busy(_))));
    drop(lock);
    second.serve().unwrap();
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(
        Store::open_existing(empty.path()),
        Err(StoreError::NotAStore(_))
    ));
}

#[test]
fn what_a_restore_left_in_a_set_does_not_keep_others_from_building_on_it() {
    let place = Place::new();
    let base = place.publish("1", "base");
    fs::create_dir(place.path("1/logs")).unwrap();
    fs::write(place.path("1/restore.log"), "restored").unwrap();
    place.publish_from(Some(base.id), "2", "child");
    assert_eq!(place.text("2/parent").unwrap(), "base");
    place.check();
}

#[test]
fn a_set_whose_files_changed_is_not_built_on() {
    for change in 0..4 {
        let place = Place::new();
        let base = place.publish("1", "base");
        let child = place.publish_from(Some(base.id), "2", "child");
        std::thread::sleep(std::time::Duration::from_millis(20));
        let path = place.path("1/text");
        match change {
            0 => fs::write(&path, "BASE").unwrap(),
            1 => fs::write(&path, "bas").unwrap(),
            2 => place.store.distrust(base.id, &path),
            _ => fs::write(place.store.state_path("sets/1/index"), "nonsense").unwrap(),
        }
        let records = place.store.records().unwrap();
        assert!(!place.store.is_sound(&child, &records), "{change}");
        let find = |text: &str| place.store.find_root(&PEER, &Digest::of(text.as_bytes()));
        assert_eq!(find("base").unwrap(), None);
        assert_eq!(find("child").unwrap(), None);
        // It is received once more, and then that one is found.
        let again = place.publish("1", "base");
        assert_eq!(find("base").unwrap(), Some(again));
    }
}

#[test]
fn a_chain_is_held_up_to_its_newest_sound_set() {
    let place = Place::new();
    let roots: Vec<_> = ["a", "b", "c"]
        .map(|text| Digest::of(text.as_bytes()))
        .into();
    let a = place.publish("1", "a");
    let b = place.publish_from(Some(a.id), "2", "b");
    assert_eq!(
        place.store.find_chain(&PEER, &roots).unwrap(),
        [true, true, false]
    );
    place.store.distrust(b.id, &place.path("2/text"));
    assert_eq!(
        place.store.find_chain(&PEER, &roots).unwrap(),
        [true, false, false]
    );
    assert_eq!(
        place.store.find_chain(&[1; 32], &roots).unwrap(),
        [false; 3]
    );
}

#[test]
fn an_unfinished_transfer_is_used_and_then_removed() {
    let mut place = Place::new();
    let (stage, _, digests) = place.stage("web", "arrived");
    fs::File::create(stage.files().join("pages-1.img"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    // Killed: the stage lies there.
    drop(stage);
    place.restart();
    assert_eq!(place.names("partial").len(), 1);
    let held = place.store.held_of(&PEER).unwrap();
    let (digest, _) = held.find(BlockId::of(&digests[0])).expect("it arrived");
    assert_eq!(digest, digests[0]);
    assert!(place.store.held_of(&[1; 32]).unwrap().is_empty());
    drop(held);
    place.publish("other", "other");
    assert_eq!(place.names("partial").len(), 1, "another name");
    place.publish("web", "arrived");
    assert_eq!(place.names("partial").len(), 0);
}

#[test]
fn what_a_killed_source_sent_is_used_before_it_is_missed() {
    let place = Place::new();
    let (_stage, _, digests) = place.stage("web", "arrived");
    place.store.adopt_stages(&PEER, "other").unwrap();
    assert!(place.store.held_of(&PEER).unwrap().is_empty());
    place.store.adopt_stages(&PEER, "web").unwrap();
    let held = place.store.held_of(&PEER).unwrap();
    assert!(held.find(BlockId::of(&digests[0])).is_some());
    assert_eq!(place.names("stage").len(), 1, "its writer may live");
}

#[test]
fn a_transfer_of_which_nothing_arrived_leaves_nothing() {
    let mut place = Place::new();
    let stage = place.store.stage(&PEER, "web", page_size()).unwrap();
    fs::File::create(stage.files().join("pages-1.img"))
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    drop(stage);
    place.restart();
    assert_eq!(place.names("partial").len() + place.names("stage").len(), 0);
}

#[test]
fn sets_that_a_transfer_reads_from_stay_until_it_is_done() {
    let place = Place::new();
    let old = place.publish("web", "old");
    let held = place.store.held_of(&PEER).unwrap();
    place.publish("web", "new");
    assert!(place.store.directory_of(&old).is_some());
    assert_eq!(held.set_with_id(old.id).unwrap().1.id, old.id);
    drop(held);
    place.store.tidy(Some("web"), 0).unwrap();
    assert_eq!(place.store.records().unwrap().len(), 1);
    place.check();
}

/// The scene of each crash: `1` with the child `2`, whose link is kept, and `1` is to be replaced.
fn scene() -> Place {
    let place = Place::new();
    let base = place.publish("1", "old");
    publish_linked(&place, "2", "child", base.id, "../1");
    place
}

/// After the crash: the old or the new generation under its name, whole, the child as it was.
fn assert_whole(place: &mut Place, expected: &str) {
    place.restart();
    assert_eq!(place.text("1").as_deref(), Some(expected));
    assert_eq!(place.text("2/parent").unwrap(), "old");
    place.check();
    place.restart();
    place.check();
    // And it goes on from there.
    place.publish("1", "next");
    place.store.remove("2").unwrap();
    place.store.tidy(Some("1"), 0).unwrap();
    assert_eq!(place.text("1").unwrap(), "next");
    place.check();
    assert_eq!(place.names("sets").len(), 1);
    assert_eq!(place.names("base").len(), 0);
}

#[test]
fn a_crash_while_a_stage_is_made_leaves_nothing() {
    let mut place = scene();
    fs::create_dir(place.store.state_path("stage/1")).unwrap();
    fs::create_dir(place.store.state_path("stage/2")).unwrap();
    fs::create_dir(place.store.state_path("stage/2/files")).unwrap();
    fs::write(place.store.state_path("stage/2/about.new"), "").unwrap();
    assert_whole(&mut place, "old");
}

#[test]
fn a_crash_while_a_base_is_cloned_or_removed_leaves_no_half_of_it() {
    let mut place = scene();
    fs::create_dir(place.store.state_path("base/1.new")).unwrap();
    fs::write(place.store.state_path("base/1.new/text"), "ol").unwrap();
    assert_whole(&mut place, "old");
}

#[test]
fn a_crash_while_the_record_is_written_leaves_the_old_generation() {
    let mut place = scene();
    let (_stage, ..) = place.stage("1", "new");
    let half = place.store.state_path("sets/3");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("index"), "").unwrap();
    assert_whole(&mut place, "old");
    assert_eq!(place.names("partial").len(), 0, "used by what came next");
}

#[test]
fn a_crash_between_record_and_switch_leaves_the_old_generation() {
    for moved_link in [false, true] {
        let mut place = scene();
        let (stage, files, digests) = place.stage("1", "new");
        let records = place.store.records().unwrap();
        let old = place.store.current("1").unwrap().unwrap();
        let new = new_set("1", "new", Some(old.id));
        place
            .store
            .link_base(&stage, &new, old.id, &records, &mut Vec::new())
            .unwrap();
        let remembered = place.store.remember(
            &stage,
            &new,
            Some(&old),
            &records,
            &files,
            digests.into_iter(),
        );
        assert_eq!(remembered.unwrap().generation, 2);
        if moved_link {
            place.store.release_name(&old, &mut Vec::new()).unwrap();
        }
        assert_whole(&mut place, "old");
    }
}

fn switched(place: &Place) -> (Stage, Option<Record>) {
    let (stage, files, digests) = place.stage("1", "new");
    let new = new_set("1", "new", None);
    let (_, old) = place
        .store
        .switch(&stage, &new, &files, digests.into_iter())
        .unwrap();
    (stage, old)
}

#[test]
fn a_crash_after_the_switch_leaves_the_new_generation() {
    let mut place = scene();
    switched(&place);
    assert_whole(&mut place, "new");
}

#[test]
fn a_crash_while_the_old_generation_is_put_away_loses_nothing() {
    for step in 0..3 {
        let mut place = scene();
        let (stage, old) = switched(&place);
        let mut old = old.unwrap();
        let place_of_old = place.store.base_path(old.id);
        old.superseded = true;
        place.store.save(&old).unwrap();
        match step {
            0 => {}
            // It lies under base already, and half of the other copy is removed.
            1 => fs::remove_file(stage.files().join("text")).unwrap(),
            _ => fs::remove_dir_all(stage.files()).unwrap(),
        }
        assert!(place_of_old.is_dir());
        assert_whole(&mut place, "new");
    }
}

#[test]
fn a_crash_while_a_superseded_child_is_given_its_link_loses_no_link() {
    let mut place = Place::new();
    let base = place.publish("1", "base");
    let child = publish_linked(&place, "2", "child", base.id, "../1").record;
    let grandchild = publish_linked(&place, "3", "grandchild", child.id, "../2").record;
    assert_eq!(grandchild.base, Some(child.id));
    let (stage, files, digests) = place.stage("2", "new");
    let new = new_set("2", "new", None);
    place
        .store
        .switch(&stage, &new, &files, digests.into_iter())
        .unwrap();
    // As if it had not been pinned, its link just taken away.
    fs::remove_dir_all(place.store.base_path(child.id)).unwrap();
    fs::remove_file(stage.files().join("parent")).unwrap();
    place.restart();
    assert_eq!(place.text("3/parent/parent").unwrap(), "base");
    place.check();
}

#[test]
fn a_crash_while_a_set_is_removed_leaves_it_or_not() {
    for step in 0..3 {
        let mut place = scene();
        let mut old = place.store.current("1").unwrap().unwrap();
        place.store.release_name(&old, &mut Vec::new()).unwrap();
        let stage = place.store.stage(&PEER, "1", page_size()).unwrap();
        fs::remove_dir(stage.files()).unwrap();
        if step > 0 {
            old.superseded = true;
            place.store.save(&old).unwrap();
        }
        if step > 1 {
            fs::rename(place.path("1"), stage.files()).unwrap();
        }
        place.restart();
        let expected = if step > 1 { None } else { Some("old") };
        assert_eq!(place.text("1").as_deref(), expected, "step {step}");
        assert_eq!(place.text("2/parent").unwrap(), "old");
        place.check();
        place.store.remove("2").unwrap();
        if step < 2 {
            place.store.remove("1").unwrap();
        }
        place.store.tidy(Some("1"), 0).unwrap();
        place.check();
        assert_eq!(place.names("sets").len(), 0);
    }
}

#[test]
fn a_publication_that_fails_leaves_things_as_they_were() {
    let mut place = scene();
    let before = snapshot(place.dir.path());
    let (stage, files, _) = place.stage("1", "new");
    // Fewer digests than blocks: the index cannot be written.
    let new = new_set("1", "new", None);
    let failed = place.store.publish(stage, new, &files, std::iter::empty());
    assert!(failed.is_err());
    let partial = place.store.state_path("partial/1");
    assert_eq!(read_about(&partial).unwrap().name, "1");
    fs::remove_dir_all(partial).unwrap();
    assert_eq!(snapshot(place.dir.path()), before);
    let (stage, files, digests) = place.stage("1", "new");
    let missing = new_set("1", "new", Some(99));
    assert!(
        place
            .store
            .publish(stage, missing, &files, digests.into_iter())
            .is_err()
    );
    assert_whole(&mut place, "old");
}

/// Every path but locks, counters and unfinished transfers, with its content.
fn snapshot(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if meta.is_dir() {
                waiting.push(path.clone());
            } else if !["lock", "serving.lock", "last-id"].contains(&name.as_str()) {
                let content = match fs::read_link(&path) {
                    Ok(target) => target.as_os_str().as_encoded_bytes().to_vec(),
                    Err(_) => fs::read(&path).unwrap(),
                };
                found.insert(path, content);
            }
        }
    }
    found
}
