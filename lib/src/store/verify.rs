//! Comparing stored sets with what was recorded of them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::error::{StoreError, Tried};
use super::{Index, Record, Store};
use crate::delta::{BlockRef, FileMeta};
use crate::digest::hash_blocks;
use crate::wire::limits;

/// What was found when a set and all that it builds on was read again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verification {
    /// Sets in the chain, the one that was asked for included.
    pub sets: usize,
    /// Files that were read.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What is not as it was stored; empty if all is well.
    pub problems: Vec<SetProblem>,
}

/// Something that is not as it was stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetProblem {
    /// The file or directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub what: String,
}

impl Store {
    /// Hashes every file of the set and of all sets that it builds on, and compares with the digests
    /// that were recorded when they were stored. Whether CRIU could restore the chain is another
    /// question: see [`Chain::completeness`](crate::image::Chain::completeness).
    pub fn verify(&self, record: &Record) -> Result<Verification, StoreError> {
        let mut verification = Verification::default();
        let mut next = Some(record.clone());
        while let Some(record) = next {
            verification.sets += 1;
            if verification.sets > limits::CHAIN {
                verification.note(&self.set_path(record.id), "builds on too many others");
                break;
            }
            // What was asked for is what its name shows; what it builds on is where links lead.
            let directory = match verification.sets {
                1 => self.visible_place(&record),
                _ => self.directory_of(&record),
            };
            let Some(directory) = directory else {
                verification.note(&self.base_path(record.id), "is gone: this set's files");
                break;
            };
            match self.index(record.id) {
                Ok(index) => verification.compare(&directory, &index)?,
                Err(error) => verification.note(
                    &directory,
                    format!("its digests cannot be read, so nothing can be compared ({error})"),
                ),
            }
            next = self.next_of(&record, &directory, &mut verification)?;
        }
        Ok(verification)
    }

    // The set that this one builds on, where its link leads there.
    fn next_of(
        &self,
        record: &Record,
        directory: &Path,
        verification: &mut Verification,
    ) -> Result<Option<Record>, StoreError> {
        let Some(id) = record.base else {
            return Ok(None);
        };
        let link = directory.join("parent");
        let Some(base) = self.records()?.into_iter().find(|base| base.id == id) else {
            verification.note(&link, "leads to a set that is not recorded any more");
            return Ok(None);
        };
        // Followed by the kernel: the text of the way there may lead through a descriptor.
        let same = |path: &Path| {
            let (target, wanted) = (fs::metadata(&link).ok()?, fs::metadata(path).ok()?);
            Some((target.dev(), target.ino()) == (wanted.dev(), wanted.ino()))
        };
        let is_named = || {
            let named = self.directory_of(&base);
            named.is_some_and(|named| same(&named) == Some(true))
        };
        let leads_there = same(&self.base_path(id)) == Some(true) || is_named();
        if !leads_there {
            verification.note(&link, "does not lead to the set that this one builds on");
        }
        Ok(Some(base))
    }
}

impl Verification {
    /// Whether everything is as it was stored.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    fn note(&mut self, path: &Path, what: impl Into<String>) {
        self.problems.push(SetProblem {
            path: path.to_owned(),
            what: what.into(),
        });
    }

    fn compare(&mut self, directory: &Path, index: &Index) -> Result<(), StoreError> {
        let mut expected = BTreeSet::from(["parent".to_owned()]);
        for (number, meta) in (0u32..).zip(index.files()) {
            expected.insert(meta.name.to_string());
            let path = directory.join(meta.name.as_str());
            match compare_file(&path, index, number) {
                Ok(None) => {}
                Ok(Some(what)) => self.note(&path, what),
                Err(error) => self.note(&path, format!("cannot be read: {error}")),
            }
            self.files += 1;
            self.bytes += meta.size;
        }
        for entry in fs::read_dir(directory).tried("list", directory)? {
            let entry = entry.tried("list", directory)?;
            let name = entry.file_name();
            if !name.to_str().is_some_and(|name| expected.contains(name)) {
                self.note(&entry.path(), "was not there when the set was stored");
            }
        }
        Ok(())
    }
}

// What is wrong with the file, if anything.
fn compare_file(path: &Path, index: &Index, number: u32) -> io::Result<Option<String>> {
    let meta = index.file(number);
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Some("is missing".to_owned()));
        }
        other => other?,
    };
    let size = file.metadata()?.len();
    if size != meta.size {
        return Ok(Some(format!("has {size} bytes, stored were {}", meta.size)));
    }
    let mut wrong = Wrong::default();
    for segment in 0..meta.segments() {
        compare_segment(&file, index, number, segment, &mut wrong)?;
    }
    Ok(wrong.describe(meta))
}

fn compare_segment(
    file: &File,
    index: &Index,
    number: u32,
    segment: u64,
    wrong: &mut Wrong,
) -> io::Result<()> {
    let meta = index.file(number);
    let blocks = meta.segment_range(segment);
    let range = meta.bytes_of(&blocks);
    let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    let mut buffer = vec![0; len];
    file.read_exact_at(&mut buffer, range.start)?;
    let mut digests = Vec::new();
    hash_blocks(&buffer, meta.block_len as usize, &mut digests);
    for (block, digest) in blocks.zip(digests) {
        let at = BlockRef {
            file: number,
            block,
        };
        if index.digest(at) != digest {
            wrong.first.get_or_insert(block);
            wrong.count += 1;
        }
    }
    Ok(())
}

/// Blocks of one file that have other bytes.
#[derive(Debug, Default)]
struct Wrong {
    first: Option<u64>,
    count: u64,
}

impl Wrong {
    fn describe(&self, meta: &FileMeta) -> Option<String> {
        let at = self.first? * u64::from(meta.block_len);
        let unit = if meta.is_pages() { "page" } else { "block" };
        let plural = if self.count == 1 { "" } else { "s" };
        Some(format!(
            "has other bytes than were stored: {} {unit}{plural}, the first at byte {at}",
            self.count
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::NewSet;
    use super::*;
    use crate::delta::FileName;
    use crate::digest::Digest;
    use crate::page::PageSize;
    use crate::wire::Layout;

    const PEER: [u8; 32] = [7; 32];

    fn publish(store: &Store, name: &str, content: &[u8], base: Option<u64>) -> Record {
        let page_size = PageSize::new(4096).unwrap();
        let stage = store.stage(&PEER, name, page_size).unwrap();
        fs::write(stage.files().join("pages-1.img"), content).unwrap();
        let file = FileName::new("pages-1.img").unwrap();
        let meta = FileMeta::new(file, 0o600, content.len() as u64, page_size);
        let mut digests = Vec::new();
        hash_blocks(content, 4096, &mut digests);
        let new = NewSet {
            name: Some(name.to_owned()),
            peer: PEER,
            names_are_owned: false,
            root: Digest::of(name.as_bytes()),
            layout: Layout::Faithful,
            page_size,
            completeness: "complete".to_owned(),
            base,
            keep_link: None,
            image_bytes: content.len() as u64,
            succeeds: None,
            tracked: false,
        };
        let published = store.publish(stage, new, &[meta], digests.into_iter());
        published.unwrap().record
    }

    fn problems(store: &Store, record: &Record) -> Vec<(String, String)> {
        let found = store.verify(record).unwrap().problems;
        let shown = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
        found
            .into_iter()
            .map(|problem| (shown(&problem.path), problem.what))
            .collect()
    }

    #[test]
    fn a_sound_chain_is_read_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let one = publish(&store, "one", &[1; 8192], None);
        let two = publish(&store, "two", &[2; 4096], Some(one.id));
        let found = store.verify(&two).unwrap();
        assert!(found.is_sound(), "{found:?}");
        assert_eq!((found.sets, found.files, found.bytes), (2, 2, 12288));
        let (other, record) = Store::find_set(&dir.path().join("two")).unwrap().unwrap();
        assert_eq!((other.root(), record), (store.root(), two));
        assert!(Store::find_set(dir.path()).unwrap().is_none());
    }

    #[test]
    fn each_kind_of_damage_is_found_with_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let one = publish(&store, "one", &[1; 12288], None);
        let file = dir.path().join("one/pages-1.img");
        let mut content = fs::read(&file).unwrap();
        content[5000] = 0;
        content[9000] = 0;
        fs::write(&file, &content).unwrap();
        fs::write(dir.path().join("one/core-1.img"), "").unwrap();
        let found = problems(&store, &one);
        assert_eq!(found[0].0, "pages-1.img");
        assert!(
            found[0].1.contains("2 pages, the first at byte 4096"),
            "{found:?}"
        );
        assert_eq!(found[1].0, "core-1.img");
        assert_eq!(found.len(), 2);

        fs::write(&file, [1; 100]).unwrap();
        assert!(
            problems(&store, &one)[0]
                .1
                .contains("100 bytes, stored were 12288")
        );
        fs::remove_file(&file).unwrap();
        assert_eq!(problems(&store, &one)[0].1, "is missing");
    }

    #[test]
    fn the_directory_with_the_name_is_read_and_not_its_twin() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let one = publish(&store, "one", &[1; 4096], None);
        publish(&store, "two", &[2; 4096], Some(one.id));
        fs::remove_file(dir.path().join("one/pages-1.img")).unwrap();
        assert_eq!(problems(&store, &one)[0].1, "is missing");
    }

    #[test]
    fn a_link_that_was_bent_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let one = publish(&store, "one", &[1; 4096], None);
        let two = publish(&store, "two", &[2; 4096], Some(one.id));
        let link = dir.path().join("two/parent");
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("../two", &link).unwrap();
        let found = problems(&store, &two);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].0, "parent");
    }

    #[test]
    fn without_digests_nothing_is_called_sound() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let one = publish(&store, "one", &[1; 4096], None);
        store.distrust(one.id, &dir.path().join("one/pages-1.img"));
        assert!(!store.verify(&one).unwrap().is_sound());
    }

    #[test]
    fn superseded_generations_are_listed_before_the_current_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let old = publish(&store, "one", &[1; 8192], None);
        publish(&store, "two", &[2; 4096], Some(old.id));
        publish(&store, "one", &[3; 4096], None);
        let sets = store.list().unwrap();
        let shown: Vec<_> = sets
            .iter()
            .map(|set| {
                (
                    set.record.name.as_str(),
                    set.record.generation,
                    set.is_current(),
                )
            })
            .collect();
        assert_eq!(
            shown,
            [("one", 1, false), ("one", 2, true), ("two", 1, true)]
        );
        assert_eq!(sets[0].pages, Some(2));
        assert_eq!(sets[2].base.as_deref(), Some("#1"));
    }
}
