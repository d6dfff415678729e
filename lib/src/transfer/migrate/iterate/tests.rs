use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::criu::testing::{Tree, criu};
use crate::image::{Chain, ImageError, PagesReader};
use crate::standby::{Event, Standby};
use crate::wire::{Codec, FrameHeader, StreamNote};

type Pages = BTreeMap<(PagemapName, u64), Vec<u8>>;

/// What went onto the stream.
#[derive(Default)]
pub(super) struct Records {
    records: Mutex<Vec<Record>>,
    stopped: AtomicBool,
}

impl Records {
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

impl Outlet for Records {
    fn put(&self, _: u32, records: &mut Vec<Record>) -> Result<(), StreamEnded> {
        self.records.lock().unwrap().append(records);
        Ok(())
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}

/// Source and destination of a migration, without a network between them.
struct Pair {
    root: tempfile::TempDir,
    outgoing: Outgoing,
    standby: Standby,
    number: u32,
}

impl Pair {
    fn new(page: PageSize) -> Self {
        let root = tempfile::tempdir().unwrap();
        Self {
            outgoing: Outgoing::new(page),
            standby: Standby::create(&root.path().join("m"), page, false).unwrap(),
            root,
            number: 0,
        }
    }

    /// One iteration; `None` where the source has no more.
    fn iterate(&mut self, source: &mut dyn PrecopySource) -> Option<(Read, Compared, u64)> {
        let number = self.number + 1;
        if !source.prepare(number).unwrap() {
            return None;
        }
        self.number = number;
        let (records, progress) = (Records::default(), &mut |_, _| {});
        let mut pass = Pass::begin(number, &mut self.outgoing, &records, progress);
        let read = source.read(&mut pass).unwrap();
        let (compared, covered) = (pass.compared, pass.covered);
        pass.end();
        let event = self.deliver(records.records.into_inner().unwrap());
        assert!(matches!(event, Some(Event::Stored { .. })), "{event:?}");
        Some((read, compared, covered))
    }

    /// The dump in `directory` as the final one. Gives what the destination has then, and what changed.
    fn finish(&mut self, directory: &Path, page: PageSize) -> (Pages, Compared) {
        self.standby.prepare_final().unwrap();
        let mut records = Vec::new();
        let mut changed = Compared::default();
        let number = self.number + 1;
        self.number = number;
        self.outgoing.begin(number, true, &mut records);
        for ((name, address), bytes) in pages_of(directory, page) {
            self.outgoing.open_dumped(name, &mut records);
            let present = crate::image::PageFlags::PRESENT;
            changed += self
                .outgoing
                .dumped_pages(name, address, present, &bytes, &mut records);
        }
        self.outgoing.end(&mut records);
        match self.deliver(records) {
            Some(Event::Complete { directory, .. }) => (pages_of(&directory, page), changed),
            other => panic!("{other:?}"),
        }
    }

    fn deliver(&mut self, records: Vec<Record>) -> Option<Event> {
        let mut last = None;
        for record in records {
            match record {
                Record::Note(note) => {
                    let note = StreamNote::decode(&note.encode()[5..]).unwrap();
                    last = self.standby.note(note).unwrap().or(last);
                }
                Record::Frame(changes) => {
                    let length = u32::try_from(changes.literal.len()).unwrap();
                    let header = FrameHeader {
                        set: self.number,
                        file: changes.object,
                        segment: changes.segment,
                        codec: Codec::Raw,
                        ops_len: 8,
                        raw_len: length,
                        payload_len: length,
                    };
                    let literal = changes.literal.into();
                    self.standby.frame(&header, &changes.ops, literal).unwrap();
                }
            }
        }
        last
    }
}

fn pages_of(directory: &Path, page: PageSize) -> Pages {
    let chain = Chain::open(directory, Some(page)).unwrap();
    let mut reader = PagesReader::new(&chain);
    let mut pages = Pages::new();
    for &name in chain.newest().pagemaps().keys() {
        for run in chain.resolve(name).unwrap() {
            let read = reader.for_each_piece(name, &run, |address, bytes| {
                for (index, bytes) in (0..).zip(bytes.chunks(page.byte_len())) {
                    pages.insert((name, address + index * page.bytes()), bytes.to_vec());
                }
                Ok::<_, ImageError>(())
            });
            read.unwrap();
        }
    }
    pages
}

/// Gives these directories, then says that there are no more.
fn given(directories: Vec<PathBuf>) -> Dumps {
    Dumps::new(move |number| {
        let index = usize::try_from(number).unwrap() - 1;
        Ok(directories.get(index).cloned())
    })
}

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata")
        .join(name)
}

#[test]
fn dumps_that_build_on_each_other_become_iterations() {
    let page = PageSize::new(4096).unwrap();
    for set in ["memcached", "shm-tree"] {
        let level = |number: u32| testdata(set).join(number.to_string());
        let mut source = ReadDumps::new(given(vec![level(1), level(2)]), page);
        let mut pair = Pair::new(page);
        let (_, first, _) = pair.iterate(&mut source).unwrap();
        let (_, second, covered) = pair.iterate(&mut source).unwrap();
        assert!(pair.iterate(&mut source).is_none());
        assert_eq!(first.pages, pages_of(&level(1), page).len() as u64);
        // What a dump leaves to the one before it is not read again.
        assert!(second.pages < covered, "{set}: {second:?}");
        assert_eq!(covered, pages_of(&level(2), page).len() as u64);
        assert_eq!(
            pages_of(&pair.standby.root().join("2"), page),
            pages_of(&level(2), page)
        );
        let (held, changed) = pair.finish(&level(3), page);
        assert_eq!(held, pages_of(&level(3), page), "{set}");
        // Shared memory is in no pre-dump.
        assert!(changed.changed < changed.pages, "{set}: {changed:?}");
    }
}

#[test]
fn a_dump_that_cannot_be_had_or_read_ends_the_migration() {
    let page = PageSize::new(4096).unwrap();
    let failing = Dumps::new(|_| Err(io::Error::other("runc says no")));
    let error = ReadDumps::new(failing, page).prepare(1).unwrap_err();
    assert!(error.to_string().contains("iteration 1"), "{error}");
    let mut source = ReadDumps::new(given(vec!["/nowhere/at/all".into()]), page);
    assert!(source.prepare(1).unwrap());
    let mut outgoing = Outgoing::new(page);
    let (records, progress) = (Records::default(), &mut |_, _| {});
    let mut pass = Pass::begin(1, &mut outgoing, &records, progress);
    let error = source.read(&mut pass).unwrap_err();
    assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
}

#[test]
fn a_dump_that_was_not_read_to_its_end_is_no_parent() {
    let page = PageSize::new(4096).unwrap();
    let level = |number: u32| testdata("memcached").join(number.to_string());
    let mut source = ReadDumps::new(given(vec![level(1), level(2)]), page);
    let mut outgoing = Outgoing::new(page);
    let records = Records::default();
    let progress = &mut |_, _| {};
    assert!(source.prepare(1).unwrap());
    records.stop();
    let mut pass = Pass::begin(1, &mut outgoing, &records, progress);
    source.read(&mut pass).unwrap();
    pass.end();
    records.stopped.store(false, Ordering::Relaxed);
    assert!(source.prepare(2).unwrap());
    let mut pass = Pass::begin(2, &mut outgoing, &records, progress);
    source.read(&mut pass).unwrap();
    assert_eq!(pass.compared.pages, pass.covered);
    assert_eq!(pass.covered, pages_of(&level(2), page).len() as u64);
}

/// Dumps the tree, which runs on.
fn dump(program: &Path, pid: u32, directory: &Path) {
    std::fs::create_dir(directory).unwrap();
    let mut criu = Command::new(program);
    criu.args(["dump", "--leave-running", "--network-lock", "skip", "-v2"])
        .args(["-o", "dump.log", "-t", &pid.to_string(), "-D"])
        .arg(directory)
        .stdin(Stdio::null());
    let output = criu.output().unwrap();
    let log = std::fs::read_to_string(directory.join("dump.log")).unwrap_or_default();
    assert!(output.status.success(), "{log}");
}

#[test]
fn dumps_of_a_running_tree_leave_little_to_the_last_one() {
    let Some(program) = criu() else { return };
    let tree = Tree::start();
    let page = PageSize::of_host();
    let mut pair = Pair::new(page);
    let root = pair.root.path().to_owned();
    let (pid, at) = (tree.pid(), root.clone());
    let of = program.clone();
    let dumps = Dumps::new(move |number| {
        if number > 2 {
            return Ok(None);
        }
        let directory = at.join(format!("dump-{number}"));
        dump(&of, pid, &directory);
        Ok(Some(directory))
    });
    let mut source = ReadDumps::new(dumps, page);
    while let Some((read, compared, _)) = pair.iterate(&mut source) {
        assert!(compared.pages > 0);
        assert!(read.frozen.is_some());
        assert!(tree.counts());
    }
    assert_eq!(pair.number, 2);
    let last = root.join("last");
    dump(&program, pid, &last);
    let (held, changed) = pair.finish(&last, page);
    assert_eq!(held, pages_of(&last, page));
    // Its children are others each time.
    assert!(changed.changed < changed.pages, "{changed:?}");
}

#[test]
fn what_cannot_pre_dump_is_read_live_unless_told_not_to() {
    let Some(program) = criu() else { return };
    let tree = Tree::start();
    let page = PageSize::of_host();
    let mut pair = Pair::new(page);
    let setup = || Setup {
        pid: tree.pid(),
        program: program.clone(),
        criu: crate::criu::CriuOptions::default(),
        work: pair.root.path().to_owned(),
        name: "one".to_owned(),
    };
    let has_soft_dirty = setup().is_possible();
    let auto = open(&Precopy::Auto, page, ReaderOptions::default(), setup()).unwrap();
    assert_eq!(auto.method().starts_with("live"), !has_soft_dirty);
    drop(auto);
    let must = open(&Precopy::PreDump, page, ReaderOptions::default(), setup());
    assert_eq!(must.is_ok(), has_soft_dirty);
    drop(must);
    // A pre-dump that fails before it has given a page.
    let broken = Setup {
        program: "/bin/false".into(),
        ..setup()
    };
    let must = PreDumps::open(broken, false, page, ReaderOptions::default());
    let mut source = must.unwrap();
    let (read, compared, _) = pair.iterate(&mut source).unwrap();
    assert!(
        read.note
            .is_some_and(|note| note.contains("cannot pre-dump"))
    );
    // A shell, with or without its child.
    assert!(compared.pages > 10 && source.method().starts_with("live"));
    assert!(Box::new(source).into_parent().is_none());
}

#[test]
fn a_last_dump_builds_on_pre_dumps() {
    let Some(program) = criu() else { return };
    let tree = Tree::start();
    let page = PageSize::of_host();
    let mut pair = Pair::new(page);
    let setup = Setup {
        pid: tree.pid(),
        program,
        criu: crate::criu::CriuOptions::default(),
        work: pair.root.path().to_owned(),
        name: "one".to_owned(),
    };
    if !setup.is_possible() {
        println!("skipped: this kernel does not track writes (CONFIG_MEM_SOFT_DIRTY)");
        return;
    }
    let mut source = PreDumps::open(setup, true, page, ReaderOptions::default()).unwrap();
    let (_, first, covered) = pair.iterate(&mut source).unwrap();
    assert_eq!(first.pages, covered);
    let (read, second, covered) = pair.iterate(&mut source).unwrap();
    assert!(second.pages < covered && read.frozen.is_some() && read.is_parent);
    assert!(tree.counts());
    let place = pair.root.path().join("one.pre-dumps");
    assert!(place.join("2/inventory.img").is_file());
    let parent = Box::new(source).into_parent().unwrap();
    assert_eq!(parent.link, "../../one.pre-dumps/2");
    assert!(parent.held.contains(&PagemapName::Task(tree.pid().into())));
    drop(parent);
    assert!(!place.exists());
}
