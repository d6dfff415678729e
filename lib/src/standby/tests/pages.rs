//! Page sessions: one dump that builds on a stored set.

use super::*;
use crate::delta::Known;

const TASK: PagemapName = PagemapName::Task(7);

fn page_of(value: u8) -> Vec<u8> {
    vec![value; PAGE]
}

/// A set with the pages 500 to 502 in its own directory, and 503 in the one that it builds on.
struct Stored {
    dir: tempfile::TempDir,
}

impl Stored {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, file, values) in [
            ("old", "pages-9.img", &[8, 9][..]),
            ("new", "pages-4.img", &[1, 2, 3]),
        ] {
            let place = dir.path().join(name);
            fs::create_dir(&place).unwrap();
            let pages: Vec<_> = values.iter().flat_map(|&value| page_of(value)).collect();
            fs::write(place.join(file), pages).unwrap();
        }
        fs::create_dir(dir.path().join("files")).unwrap();
        Self { dir }
    }

    fn files(&self) -> PathBuf {
        self.dir.path().join("files")
    }

    fn held(&self) -> HeldPages {
        let digests = |values: &[u8]| values.iter().map(|&it| Digest::of(&page_of(it))).collect();
        HeldPages {
            directories: ["new", "old"].map(|name| self.dir.path().join(name)).into(),
            memories: vec![HeldMemory {
                name: TASK,
                pages_ids: vec![4, 9],
                runs: vec![
                    HeldPlaces {
                        first: 500,
                        level: 0,
                        index: 0,
                        digests: digests(&[1, 2, 3]),
                    },
                    HeldPlaces {
                        first: 503,
                        level: 1,
                        index: 1,
                        digests: digests(&[9]),
                    },
                ],
            }],
        }
    }

    fn standby(&self) -> Standby {
        Standby::building_on(&self.files(), page_size(), self.held(), None).unwrap()
    }

    fn known(&self) -> Known {
        let mut known = Known::new(page_size());
        for memory in self.held().memories {
            let (object, _) = known.object(memory.name);
            for run in memory.runs {
                known.hold(object, run.first, &run.digests);
            }
        }
        known
    }

    // The records of a dump with these pages.
    fn records(&self, pages: &[(u64, u8)]) -> (Vec<Record>, Outgoing) {
        let mut outgoing = Outgoing::building_on(page_size(), self.known());
        let mut records = Vec::new();
        outgoing.begin(1, true, &mut records);
        outgoing.open_dumped(TASK, &mut records);
        for &(page, value) in pages {
            let (address, flags) = (page * PAGE as u64, PageFlags::PRESENT);
            outgoing.dumped_pages(TASK, address, flags, &page_of(value), &mut records);
        }
        outgoing.end(&mut records);
        (records, outgoing)
    }
}

// What the dump says of each page, from the directory that would be published.
fn flags_of(directory: &Path) -> Vec<(u64, PageFlags)> {
    let bytes = fs::read(directory.join("pagemap-7.img")).unwrap();
    let pagemap = crate::image::Pagemap::parse(&bytes, "pagemap-7.img", page_size()).unwrap();
    let runs = pagemap.runs().iter();
    let each = |run: &crate::image::PageRun| {
        let (first, flags) = (run.vaddr / PAGE as u64, run.flags);
        (first..first + run.pages).map(move |page| (page, flags))
    };
    runs.flat_map(each).collect()
}

#[test]
fn only_what_the_set_lacks_at_its_place_is_written() {
    let stored = Stored::new();
    let mut standby = stored.standby();
    // Unchanged in both directories, a new one, and copies of pages from both.
    let pages = [(500, 1), (501, 77), (503, 9), (600, 3), (601, 9), (602, 0)];
    let (records, outgoing) = stored.records(&pages);
    let events = deliver(&mut standby, records).unwrap();
    let Some(Event::Dumped(dumped)) = events.last() else {
        panic!("{events:?}")
    };
    assert_eq!(
        (dumped.pages, dumped.fresh_pages, dumped.needs_held),
        (6, 4, true)
    );
    let (old, new) = (PageFlags::PARENT, PageFlags::PRESENT);
    assert_eq!(
        flags_of(&stored.files()),
        [
            (500, old),
            (501, new),
            (503, old),
            (600, new),
            (601, new),
            (602, new)
        ]
    );
    let fresh = [77, 3, 9, 0].map(page_of).concat();
    assert_eq!(fs::read(stored.files().join("pages-1.img")).unwrap(), fresh);
    let digests: Vec<_> = [77, 3, 9, 0].map(|it| Digest::of(&page_of(it))).into();
    assert_eq!(dumped.files, [("pages-1.img".to_owned(), digests)]);
    assert!(
        !stored.files().join("parent").exists(),
        "the store makes it"
    );
    // What the source knows from then on is exactly what was dumped.
    let known = outgoing.into_known();
    let object = known.find(TASK).unwrap();
    for (page, value) in pages {
        assert_eq!(
            known.digest(object, page),
            Some(Digest::of(&page_of(value)))
        );
    }
    assert_eq!(known.digest(object, 502), None);
}

#[test]
fn a_page_that_went_bad_is_not_copied() {
    for (directory, file, copied) in [("new", "pages-4.img", 3), ("old", "pages-9.img", 9)] {
        let stored = Stored::new();
        let path = stored.dir.path().join(directory).join(file);
        let length = fs::metadata(&path).unwrap().len();
        fs::write(&path, vec![5; usize::try_from(length).unwrap()]).unwrap();
        let (records, _) = stored.records(&[(500, 1), (600, copied)]);
        let result = deliver(&mut stored.standby(), records);
        assert!(matches!(result, Err(StandbyError::Root)), "{result:?}");
    }
}

#[test]
fn another_dump_than_was_stated_is_refused() {
    let stored = Stored::new();
    let (mut records, _) = stored.records(&[(500, 1), (501, 4)]);
    let Some(Record::Note(StreamNote::End { root, .. })) = records.last_mut() else {
        panic!("a dump ends")
    };
    *root = Some(Digest([1; 32]));
    let result = deliver(&mut stored.standby(), records);
    assert!(matches!(result, Err(StandbyError::Root)), "{result:?}");
}

#[test]
fn nothing_but_one_dump_of_memory_is_taken() {
    let stored = Stored::new();
    let begin = |number, is_final| StreamNote::Begin { number, is_final };
    for (number, is_final) in [(1, false), (0, true), (2, true), (3, true)] {
        let refused = stored.standby().note(begin(number, is_final));
        assert!(matches!(refused, Err(StandbyError::Protocol(_))));
    }
    let mut standby = stored.standby();
    standby.note(begin(1, true)).unwrap();
    let file = Object::File {
        name: FileName::new("core-7.img").unwrap(),
        mode: 0o644,
        size: 1,
    };
    assert!(standby.note(StreamNote::Objects(vec![file])).is_err());
    // Named by the set already.
    let known = Object::Memory(TASK);
    assert!(standby.note(StreamNote::Objects(vec![known])).is_err());
}

#[test]
fn more_bytes_than_are_taken_end_it() {
    let stored = Stored::new();
    let most = Some(2 * PAGE as u64);
    let mut standby =
        Standby::building_on(&stored.files(), page_size(), stored.held(), most).unwrap();
    let far: Vec<_> = (1..=4u8)
        .map(|value| (u64::from(value) * 1000, value + 20))
        .collect();
    let (records, _) = stored.records(&far);
    let result = deliver(&mut standby, records);
    assert!(
        matches!(result, Err(StandbyError::TooLarge { .. })),
        "{result:?}"
    );
}
