//! CRIU's own pre-copy: pre-dumps of what was written since the last one.
//!
//! ```text
//!  thread "pre-dump"   Worker::pre_dump ── freezes ── collects ── lets run ── writes
//!  this thread         page_client::serve ── pages compared, changed ones onto the stream ── CLOSE
//!                      then the live reader: shared memory, which CRIU never pre-dumps
//! ```
//!
//! Memory goes over the socket; what stays here of an iteration is its directory with
//! `inventory.img`, by which CRIU's next dump tells whether a pid is still the same process.
//!
//! A pre-dump takes the marks away from the pages that it reads. So one that was not read to its end
//! leaves gaps that nobody can name: no later dump may build on it or on any before it. It begins
//! anew without parent then, which costs time and no bytes on the wire, for content decides what is sent.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;

use super::{Live, Pass, PrecopySource, Read};
use crate::criu::page_client::{self, PageSink, SinkError};
use crate::criu::page_server::Batch;
use crate::criu::{CriuError, CriuOptions, PreDumpOptions, Worker};
use crate::image::{DumpStats, PageFlags, PageRun, PagemapName};
use crate::live::ReaderOptions;
use crate::page::PageSize;
use crate::transfer::clock::Clock;
use crate::transfer::migrate::MigrateError;
use crate::transfer::migrate::freeze::{self, Prepared, private_directory};

/// What pre-dumps are made of.
#[derive(Debug)]
pub(in crate::transfer::migrate) struct Setup {
    pub(in crate::transfer::migrate) pid: u32,
    pub(in crate::transfer::migrate) program: PathBuf,
    pub(in crate::transfer::migrate) criu: CriuOptions,
    /// Where the final dump will have its directory, called `name`.
    pub(in crate::transfer::migrate) work: PathBuf,
    pub(in crate::transfer::migrate) name: String,
}

impl Setup {
    /// Whether CRIU and the kernel can do it. What else is wrong with CRIU shows in the final dump.
    pub(super) fn is_possible(&self) -> bool {
        let worker = Worker::start(&self.program, None, None);
        worker.is_ok_and(|mut worker| worker.probe().is_ok_and(|probe| probe.mem_track))
    }
}

/// The directories of all pre-dumps; removed with this.
#[derive(Debug)]
struct Place {
    root: PathBuf,
    keep: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_dir_all(&self.root);
        }
    }
}

/// What the final dump builds on. Must be kept until it has ended.
#[derive(Debug)]
pub(in crate::transfer::migrate) struct Parent {
    /// The last pre-dump, as seen from the directory of the final images.
    pub(in crate::transfer::migrate) link: String,
    /// The tasks that the destination holds from it.
    pub(in crate::transfer::migrate) held: BTreeSet<PagemapName>,
    /// Where CRIU keeps the pidfds of the tree.
    pub(in crate::transfer::migrate) pidfds: Option<UnixDatagram>,
    _place: Place,
}

/// Pre-dumps as a source of pre-copy.
#[derive(Debug)]
pub(in crate::transfer::migrate) struct PreDumps {
    setup: Setup,
    page: PageSize,
    place: Place,
    live: Live,
    pidfds: Option<UnixDatagram>,
    /// The last iteration, if it was read to its end.
    parent: Option<u32>,
    held: BTreeSet<PagemapName>,
    // Not to fall back to the live reader where the first one fails.
    must: bool,
    falls_back: bool,
}

impl PreDumps {
    pub(super) fn open(
        setup: Setup,
        must: bool,
        page: PageSize,
        reader: ReaderOptions,
    ) -> Result<Self, MigrateError> {
        let mut live = Live::open(setup.pid, page, reader)?;
        live.set_only_shared(true);
        let name = directory_name(&setup.name);
        let root = private_directory(&setup.work, &name);
        let root = root.map_err(|source| MigrateError::Work {
            path: setup.work.clone(),
            source,
        })?;
        Ok(Self {
            setup,
            page,
            place: Place { root, keep: false },
            live,
            // Where the kernel has no pidfds CRIU is not given it, and compares start times.
            pidfds: UnixDatagram::unbound().ok(),
            parent: None,
            held: BTreeSet::new(),
            must,
            falls_back: false,
        })
    }

    fn pre_dump(&mut self, pass: &mut Pass<'_>) -> Result<Option<Duration>, CriuError> {
        let Prepared {
            mut worker,
            mut socket,
            probe,
        } = freeze::prepare(&self.setup.program)?;
        if !probe.pidfd_store {
            self.pidfds = None;
        }
        let number = pass.number;
        let directory = self.place.root.join(number.to_string());
        fs::create_dir(&directory).map_err(CriuError::io("make a directory for the pre-dump"))?;
        let images =
            File::open(&directory).map_err(CriuError::io("open the directory of the pre-dump"))?;
        let options = PreDumpOptions {
            pid: self.setup.pid,
            images: images.as_fd(),
            work: images.as_fd(),
            log_file: "pre-dump.log".into(),
            parent: self.parent.map(|number| format!("../{number}")),
            page_server: true,
            read_memory: false,
            pidfd_store: self.pidfds.as_ref().map(|socket| socket.as_fd()),
            criu: self.setup.criu.clone(),
        };
        let mut memory = Memory {
            pass,
            parent: std::mem::take(&mut self.held),
            opened: BTreeSet::new(),
            gap: None,
            stopped: false,
        };
        let canceller = worker.canceller();
        let (dumped, served) = std::thread::scope(|scope| {
            let ends = canceller.clone();
            let dumping = scope.spawn(move || {
                let dumped = worker.pre_dump(&options);
                if dumped.is_err() {
                    // Ends the reading below, whatever state the worker is in.
                    ends.cancel();
                }
                dumped
            });
            let served = page_client::serve(&mut socket, self.page, &mut memory);
            if served.is_err() {
                // CRIU must not wait for a socket that nobody reads.
                canceller.cancel();
            }
            (
                dumping.join().expect("CRIU's client does not panic"),
                served,
            )
        });
        if memory.stopped {
            self.parent = None;
            return Ok(None);
        }
        if let Err(error) = served {
            // CRIU's own error says more, unless it is only that of this side's end.
            return Err(match dumped {
                Err(error @ CriuError::Failed(_)) => error,
                _ => CriuError::Io {
                    pid: self.setup.pid,
                    action: "take the memory of the pre-dump",
                    source: std::io::Error::other(error),
                },
            });
        }
        dumped?;
        (self.parent, self.held) = match memory.gap {
            None => (Some(number), memory.opened),
            Some(_) => (None, BTreeSet::new()),
        };
        Ok(frozen_time(&directory))
    }
}

impl PrecopySource for PreDumps {
    fn method(&self) -> &'static str {
        if self.falls_back {
            self.live.method()
        } else {
            "CRIU pre-dumps, soft-dirty"
        }
    }

    fn read(&mut self, pass: &mut Pass<'_>) -> Result<Read, MigrateError> {
        if self.falls_back {
            return self.live.read(pass);
        }
        let clock = Clock::start();
        let frozen = match self.pre_dump(pass) {
            Ok(frozen) => frozen,
            Err(error) if !self.must && pass.number == 1 && pass.covered == 0 => {
                self.falls_back = true;
                self.live.set_only_shared(false);
                let note = format!("memory was read live, for CRIU cannot pre-dump: {error}");
                let read = self.live.read(pass)?;
                return Ok(Read {
                    note: Some(note),
                    ..read
                });
            }
            Err(error) => {
                self.place.keep = matches!(error, CriuError::Failed(_));
                return Err(error.into());
            }
        };
        let took = clock.elapsed();
        if pass.is_stopped() {
            return Ok(Read {
                took,
                frozen,
                ..Read::default()
            });
        }
        let shared = self.live.read(pass)?;
        Ok(Read {
            took: took + shared.took,
            frozen,
            is_parent: self.parent.is_some(),
            note: None,
        })
    }

    fn into_parent(self: Box<Self>) -> Option<Parent> {
        let number = self.parent?;
        Some(Parent {
            // From NAME/images.
            link: format!("../../{}/{number}", directory_name(&self.setup.name)),
            held: self.held,
            pidfds: self.pidfds,
            _place: self.place,
        })
    }
}

fn directory_name(name: &str) -> String {
    format!("{name}.pre-dumps")
}

/// How long CRIU says that the tree stood still.
fn frozen_time(directory: &Path) -> Option<Duration> {
    let bytes = fs::read(directory.join("stats-dump")).ok()?;
    let stats = DumpStats::parse(&bytes, "stats-dump").ok()?;
    Some(Duration::from_micros(stats.frozen_time.into()))
}

/// Where the memory of a pre-dump goes.
struct Memory<'a, 'b> {
    pass: &'a mut Pass<'b>,
    /// What the destination holds from the pre-dump before.
    parent: BTreeSet<PagemapName>,
    opened: BTreeSet<PagemapName>,
    /// A page that CRIU takes for known and that never came.
    gap: Option<(PagemapName, u64)>,
    stopped: bool,
}

impl Memory<'_, '_> {
    fn go_on(&mut self, go_on: bool) -> Result<(), SinkError> {
        if go_on {
            return Ok(());
        }
        self.stopped = true;
        Err("the iteration is ended early".into())
    }
}

impl PageSink for Memory<'_, '_> {
    fn open(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        self.opened.insert(space);
        Ok(self.parent.contains(&space))
    }

    fn has_parent(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        Ok(self.parent.contains(&space))
    }

    fn pages(&mut self, batch: &Batch, bytes: Bytes) -> Result<(), SinkError> {
        let go_on = self.pass.pages(batch.space, batch.vaddr, &bytes);
        self.go_on(go_on)
    }

    fn elsewhere(&mut self, space: PagemapName, run: PageRun) -> Result<(), SinkError> {
        if run.flags != PageFlags::PARENT {
            return Err("CRIU kept pages back".into());
        }
        let missing = self.pass.outgoing.missing(space, run.vaddr, run.pages);
        if let Some(missing) = missing {
            self.gap.get_or_insert((space, missing));
        }
        let go_on = self.pass.covered(run.pages);
        self.go_on(go_on)
    }

    fn close(&mut self) -> Result<i32, SinkError> {
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::Outgoing;
    use crate::transfer::migrate::iterate::tests::Records;

    const TASK: PagemapName = PagemapName::Task(7);

    fn run(vaddr: u64, pages: u64, flags: PageFlags) -> PageRun {
        PageRun {
            vaddr,
            pages,
            flags,
        }
    }

    fn batch(vaddr: u64) -> (Batch, Bytes) {
        let batch = Batch {
            space: TASK,
            vaddr,
            pages: 1,
            flags: PageFlags::PRESENT,
            len: 4096,
            header_follows: 0,
        };
        (batch, Bytes::from(vec![1; 4096]))
    }

    #[test]
    fn pages_that_never_came_are_noticed() {
        let mut outgoing = Outgoing::new(PageSize::new(4096).unwrap());
        let (records, progress) = (Records::default(), &mut |_, _| {});
        let mut pass = Pass::begin(1, &mut outgoing, &records, progress);
        let mut memory = Memory {
            pass: &mut pass,
            parent: BTreeSet::from([TASK]),
            opened: BTreeSet::new(),
            gap: None,
            stopped: false,
        };
        assert!(memory.open(TASK).unwrap());
        assert!(!memory.has_parent(PagemapName::Task(8)).unwrap());
        let (first, bytes) = batch(4096);
        memory.pages(&first, bytes).unwrap();
        memory
            .elsewhere(TASK, run(4096, 1, PageFlags::PARENT))
            .unwrap();
        assert_eq!(memory.gap, None);
        memory
            .elsewhere(TASK, run(4096, 2, PageFlags::PARENT))
            .unwrap();
        assert_eq!(memory.gap, Some((TASK, 8192)));
        let lazy = PageFlags::from_bits(2).unwrap();
        assert!(memory.elsewhere(TASK, run(8192, 1, lazy)).is_err());
        assert_eq!(pass.covered, 4);
    }

    #[test]
    fn a_stopped_iteration_ends_the_pre_dump() {
        let mut outgoing = Outgoing::new(PageSize::new(4096).unwrap());
        let (records, progress) = (Records::default(), &mut |_, _| {});
        records.stop();
        let mut pass = Pass::begin(1, &mut outgoing, &records, progress);
        let mut memory = Memory {
            pass: &mut pass,
            parent: BTreeSet::new(),
            opened: BTreeSet::new(),
            gap: None,
            stopped: false,
        };
        let (first, bytes) = batch(4096);
        assert!(memory.pages(&first, bytes).is_err());
        assert!(memory.stopped);
    }
}
