mod pages;
mod random;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::delta::{FileMeta, FileName, Outgoing, Record};
use crate::image::{Chain, PageFlags, PagesReader};
use crate::wire::Codec;

const PAGE: usize = 4096;

// Memory by name and page number: what each page is filled with.
type Memories = BTreeMap<PagemapName, BTreeMap<u64, u8>>;

fn page_size() -> PageSize {
    PageSize::new(4096).unwrap()
}

fn small() -> Memories {
    let task = PagemapName::Task(7);
    let child = PagemapName::Task(8);
    let shared = PagemapName::Shmem(4711);
    BTreeMap::from([
        (task, (500..520).map(|page| (page, 1)).collect()),
        (child, [(500, 1), (900, 3), (901, 0)].into()),
        (shared, [(0, 5), (700, 6)].into()),
    ])
}

fn deliver(standby: &mut Standby, records: Vec<Record>) -> Result<Vec<Event>, StandbyError> {
    let mut events = Vec::new();
    for record in records {
        match record {
            Record::Note(note) => {
                let note = StreamNote::decode(&note.encode()[5..]).unwrap();
                events.extend(standby.note(note)?);
            }
            Record::Frame(changes) => {
                let length = u32::try_from(changes.literal.len()).unwrap();
                let header = FrameHeader {
                    set: standby.number(),
                    file: changes.object,
                    segment: changes.segment,
                    codec: Codec::Raw,
                    ops_len: 8,
                    raw_len: length,
                    payload_len: length,
                };
                standby.frame(&header, &changes.ops, changes.literal.into())?;
            }
        }
    }
    Ok(events)
}

// The pages of `memories`, in runs as a dump would give them.
fn for_each_page(memories: &Memories, mut each: impl FnMut(PagemapName, u64, &[u8])) {
    for (&name, pages) in memories {
        for (&page, &value) in pages {
            each(name, page * 4096, &[value; PAGE]);
        }
    }
}

fn iterate(out: &mut Outgoing, standby: &mut Standby, number: u32, memories: &Memories) {
    let mut records = Vec::new();
    out.begin(number, false, &mut records);
    for_each_page(memories, |name, address, bytes| {
        out.pages(name, address, bytes, &mut records);
    });
    out.end(&mut records);
    let events = deliver(standby, records).unwrap();
    assert!(matches!(events[1], Event::Stored { .. }), "{events:?}");
}

fn final_records(out: &mut Outgoing, number: u32, memories: &Memories) -> Vec<Record> {
    let mut records = Vec::new();
    out.begin(number, true, &mut records);
    for &name in memories.keys() {
        out.open_dumped(name, &mut records);
    }
    for_each_page(memories, |name, address, bytes| {
        out.dumped_pages(name, address, PageFlags::PRESENT, bytes, &mut records);
    });
    let content = vec![b'c'; 100_000];
    let meta = FileMeta::new(
        FileName::new("core-7.img").unwrap(),
        0o640,
        content.len() as u64,
        page_size(),
    );
    let mut file = out.begin_file(meta, &mut records);
    while let Some(part) = file.next_part() {
        out.file_part(&mut file, content[..part].to_vec(), &mut records);
    }
    out.end_file(file);
    out.end(&mut records);
    records
}

fn read_back(directory: &Path) -> Memories {
    let chain = Chain::open(directory, Some(page_size())).unwrap();
    let mut found = Memories::new();
    let mut reader = PagesReader::new(&chain);
    for &name in chain.newest().pagemaps().keys() {
        let pages = found.entry(name).or_default();
        for run in chain.resolve(name).unwrap() {
            let mut page = run.vaddr / 4096;
            let read = reader.for_each_piece(name, &run, |_, bytes| {
                for bytes in bytes.chunks(PAGE) {
                    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                    pages.insert(page, bytes[0]);
                    page += 1;
                }
                Ok::<_, ImageError>(())
            });
            read.unwrap();
        }
    }
    found
}

struct Place {
    _root: tempfile::TempDir,
    standby: Standby,
}

fn place() -> Place {
    let root = tempfile::tempdir().unwrap();
    let standby = Standby::create(&root.path().join("m"), page_size(), true).unwrap();
    Place {
        _root: root,
        standby,
    }
}

#[test]
fn the_final_directory_has_exactly_the_dump() {
    let Place { _root, mut standby } = place();
    let mut out = Outgoing::new(page_size());
    let mut memories = small();
    iterate(&mut out, &mut standby, 1, &memories);
    assert_eq!(read_back(&standby.root().join("1")), memories);

    // A page changes, one comes, one becomes zero; another process begins.
    let task = memories.get_mut(&PagemapName::Task(7)).unwrap();
    task.extend([(505, 9), (4000, 4), (506, 0)]);
    memories.insert(PagemapName::Task(9), [(1, 1)].into());
    iterate(&mut out, &mut standby, 2, &memories);
    assert_eq!(read_back(&standby.root().join("2")), memories);
    standby.drop_replaced();
    assert_eq!(read_back(&standby.root().join("2")), memories);

    // Pages go, a process ends, pages change once more.
    let task = memories.get_mut(&PagemapName::Task(7)).unwrap();
    task.retain(|page, _| page % 2 == 0);
    task.insert(502, 77);
    memories.remove(&PagemapName::Task(9));
    memories.insert(PagemapName::Task(10), BTreeMap::new());
    standby.prepare_final().unwrap();
    let records = final_records(&mut out, 3, &memories);
    let events = deliver(&mut standby, records).unwrap();
    let Event::Complete {
        directory,
        pages,
        fresh_pages,
    } = &events[1]
    else {
        panic!("{events:?}");
    };
    assert_eq!((*pages, *fresh_pages), (16, 1));
    assert_eq!(read_back(directory), memories);
    sync_directory(directory).unwrap();
    let core = fs::metadata(directory.join("core-7.img")).unwrap();
    assert_eq!((core.len(), core.mode() & 0o777), (100_000, 0o640));
    assert_eq!(fs::metadata(directory).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn a_dump_without_iterations_needs_no_parent() {
    let Place { _root, mut standby } = place();
    let mut out = Outgoing::new(page_size());
    let records = final_records(&mut out, 1, &small());
    let events = deliver(&mut standby, records).unwrap();
    assert!(matches!(events[1], Event::Complete { .. }));
    let directory = standby.root().join(FINAL);
    assert_eq!(read_back(&directory), small());
    assert!(!directory.join("parent").exists());
}

#[test]
fn pages_that_were_replaced_take_no_room() {
    let Place { _root, mut standby } = place();
    let mut out = Outgoing::new(page_size());
    // Each page different, or they would be copies of one.
    let distinct = |seed: u64| {
        (0..1024_u64).map(move |page| (page, [page.to_le_bytes(), seed.to_le_bytes()].concat()))
    };
    for number in 1..=3 {
        let mut records = Vec::new();
        out.begin(number, false, &mut records);
        for (page, bytes) in distinct(number.into()) {
            let bytes = bytes.repeat(PAGE / 16);
            out.pages(PagemapName::Task(7), page * 4096, &bytes, &mut records);
        }
        out.end(&mut records);
        deliver(&mut standby, records).unwrap();
        standby.drop_replaced();
    }
    let blocks = |number: u32| {
        let file = standby.root().join(format!("{number}/pages-1.img"));
        fs::metadata(file).unwrap().blocks() * 512
    };
    assert!(blocks(3) >= 4 << 20);
    assert!(
        blocks(1) + blocks(2) < 1 << 20,
        "{} {}",
        blocks(1),
        blocks(2)
    );
}

#[test]
fn another_dump_than_the_stated_one_is_refused() {
    let tamper: [fn(&mut Vec<Record>); 5] = [
        // A page of other content.
        |records| {
            let frame = records.iter_mut().find_map(|record| match record {
                Record::Frame(changes) if !changes.literal.is_empty() => Some(changes),
                _ => None,
            });
            frame.unwrap().literal[5] ^= 1;
        },
        // A frame is lost.
        |records| {
            let at = records
                .iter()
                .position(|record| matches!(record, Record::Frame(_)));
            records.remove(at.unwrap());
        },
        // A run is cut short.
        |records| {
            for record in records {
                if let Record::Note(StreamNote::Runs { runs, .. }) = record
                    && let Some(run) = runs.last_mut()
                    && run.pages > 1
                {
                    run.pages -= 1;
                }
            }
        },
        // Another root.
        |records| {
            if let Some(Record::Note(StreamNote::End { root, .. })) = records.last_mut() {
                *root = Some(Digest([1; 32]));
            }
        },
        // A frame comes twice.
        |records| {
            let at = records
                .iter()
                .position(|record| matches!(record, Record::Frame(_)))
                .unwrap();
            records.insert(at, records[at].clone());
        },
    ];
    for (number, tamper) in tamper.into_iter().enumerate() {
        let Place { _root, mut standby } = place();
        let mut out = Outgoing::new(page_size());
        let mut records = final_records(&mut out, 1, &small());
        tamper(&mut records);
        assert!(deliver(&mut standby, records).is_err(), "{number}");
    }
}

#[test]
fn a_stream_out_of_order_is_refused() {
    let begin = |number, is_final| Record::Note(StreamNote::Begin { number, is_final });
    let memory = || {
        let memory = Object::Memory(PagemapName::Task(7));
        Record::Note(StreamNote::Objects(vec![memory]))
    };
    let file = || {
        let file = Object::File {
            name: FileName::new("pages-1.img").unwrap(),
            mode: 0o600,
            size: 5,
        };
        Record::Note(StreamNote::Objects(vec![file]))
    };
    let same = || {
        let from = BlockRef { file: 0, block: 3 };
        Record::Frame(crate::delta::Changes {
            object: 0,
            segment: 0,
            ops: vec![Op::Same(1, from), Op::Held(255)],
            literal: Vec::new(),
        })
    };
    let frame = |object, segment, ops: Vec<Op>| {
        let literal = vec![1; PAGE];
        Record::Frame(crate::delta::Changes {
            object,
            segment,
            ops,
            literal,
        })
    };
    let whole = || vec![Op::Literal(1), Op::Held(255)];
    for (number, records) in [
        vec![begin(2, false)],
        vec![memory()],
        vec![begin(1, false), begin(2, false)],
        vec![begin(1, false), file()],
        vec![begin(1, true), file()],
        vec![begin(1, false), memory(), memory()],
        vec![begin(1, false), memory(), same()],
        vec![begin(1, false), frame(0, 0, whole())],
        vec![begin(1, false), memory(), frame(0, 0, vec![Op::Literal(1)])],
        vec![begin(1, false), memory(), frame(0, u64::MAX, whole())],
        vec![
            begin(1, false),
            memory(),
            frame(0, 0, vec![Op::Literal(2), Op::Held(254)]),
        ],
        vec![
            begin(1, false),
            memory(),
            frame(0, 1, whole()),
            frame(0, 0, whole()),
        ],
        vec![
            begin(1, false),
            Record::Note(StreamNote::End {
                number: 1,
                root: Some(Digest([1; 32])),
            }),
        ],
        vec![
            begin(1, true),
            Record::Note(StreamNote::End {
                number: 1,
                root: None,
            }),
        ],
    ]
    .into_iter()
    .enumerate()
    {
        let Place { _root, mut standby } = place();
        assert!(deliver(&mut standby, records).is_err(), "{number}");
    }
}

// Descriptors of files below `root` that this process has open.
fn open_below(root: &Path) -> usize {
    let entries = fs::read_dir("/proc/self/fd").unwrap();
    let targets = entries.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    targets.filter(|target| target.starts_with(root)).count()
}

/// Held open until the end, the images of a tree of some hundred processes were more than a process
/// may have open.
#[test]
fn one_file_at_a_time_is_open() {
    let Place { _root, mut standby } = place();
    let mut out = Outgoing::new(page_size());
    let memories: Memories = (1..60)
        .map(|pid| (PagemapName::Task(pid), [(pid, 1), (pid + 300, 2)].into()))
        .collect();
    let root = fs::canonicalize(standby.root()).unwrap();
    let mut records = Vec::new();
    out.begin(1, true, &mut records);
    for_each_page(&memories, |name, address, bytes| {
        out.dumped_pages(name, address, PageFlags::PRESENT, bytes, &mut records);
    });
    for pid in 1..60 {
        let name = FileName::new(format!("core-{pid}.img")).unwrap();
        let file = out.begin_file(FileMeta::new(name, 0o600, 0, page_size()), &mut records);
        out.end_file(file);
    }
    out.end(&mut records);
    for record in records {
        deliver(&mut standby, vec![record]).unwrap();
        assert!(open_below(&root) <= 1);
    }
    assert_eq!(open_below(&root), 0);
    assert_eq!(read_back(&standby.root().join(FINAL)), memories);
}

/// 256 ops of 256 pages each would be 128 GiB of copies with the largest pages.
#[test]
fn copies_are_not_made_for_a_frame_that_is_refused() {
    let begin = |standby: &mut Standby| {
        let object = |id| Object::Memory(PagemapName::Task(id));
        for note in [
            StreamNote::Begin {
                number: 1,
                is_final: true,
            },
            StreamNote::Objects(vec![object(1), object(2)]),
        ] {
            standby.note(note).unwrap();
        }
    };
    let frame = |object, ops: Vec<Op>, literal: Vec<u8>| {
        Record::Frame(crate::delta::Changes {
            object,
            segment: 0,
            ops,
            literal,
        })
    };
    let Place { _root, mut standby } = place();
    begin(&mut standby);
    let whole = vec![Op::Zero(256)];
    deliver(&mut standby, vec![frame(0, whole, Vec::new())]).unwrap();
    let copy = Op::Same(256, BlockRef { file: 0, block: 0 });
    // A copy that cannot be made would be another error.
    let never = Op::Same(
        1,
        BlockRef {
            file: 0,
            block: 999,
        },
    );
    let too_many = frame(1, [vec![copy; 255], vec![never]].concat(), Vec::new());
    let refused = deliver(&mut standby, vec![too_many]).unwrap_err();
    assert!(refused.to_string().contains("wrong length"), "{refused}");
}
