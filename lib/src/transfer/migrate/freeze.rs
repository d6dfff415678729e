//! The freeze: CRIU dumps the tree, its memory is compared while it still dumps.
//!
//! ```text
//!  thread "dump"    Worker::dump ── pre-dump ── freezes ── … ── post-dump: holds ── told how to end
//!  thread "memory"  page_client::serve ── pieces of memory, up to CLOSE
//!      └ beside it  pages compared, changed ones onto the stream
//!  driver           hears of each moment; at post-dump has the other images sent; asks for the vote
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc as blocking};

use bytes::Bytes;

use super::MigrateError;
use super::iterate::Parent;
use super::record::Records;
use super::stream::RecordStream;
use crate::criu::page_client::{self, PageSink, SinkError};
use crate::criu::page_server::Batch;
use crate::criu::{Canceller, CriuError, CriuOptions, DumpOptions, Probe, Stage, Verdict, Worker};
use crate::delta::{Compared, FileMeta, FileName, Outgoing, Record};
use crate::image::{DumpStats, Inventory, PageFlags, PageRun, PagemapName};
use crate::page::PageSize;
use crate::runtime::DumpCommand;
use crate::transfer::clock::Clock;
use crate::transfer::external::action::POINTER;
use crate::transfer::external::memory::{Door, DoorKeeper, Memory};
use crate::transfer::external::{action, command, scripts};
use crate::transfer::pause;
use crate::tree::{Process, Tree, hold};

/// What happens during the freeze, in order.
#[derive(Debug)]
pub(super) enum Moment {
    /// CRIU is about to freeze the tree.
    Freezing { at_ns: u64 },
    /// CRIU's memory stream has begun: the tree is frozen.
    MemoryBegins { at_ns: u64 },
    /// All memory was compared, and what changed is on the stream. Gives back what reads.
    MemoryEnds {
        at_ns: u64,
        outgoing: Box<Outgoing>,
        result: Result<Compared, String>,
    },
    /// All images are written; the tree stays frozen until [`Frozen::end`].
    ///
    /// `images`: where they are, if not where they were asked for.
    Held { at_ns: u64, images: Option<Images> },
    /// CRIU has ended: the tree is gone, or runs on.
    Ended { result: Result<(), MigrateError> },
}

/// Images that a command has made.
#[derive(Clone, Debug)]
pub(super) struct Images {
    /// CRIU's own directory, for as long as CRIU holds the tree.
    pub(super) path: PathBuf,
    /// Memory is among them, and is compared from there.
    pub(super) has_memory: bool,
}

/// Makes the directory `parent/name`, mode 0700; `parent`, too, where it is missing.
pub(super) fn private_directory(parent: &Path, name: &str) -> std::io::Result<PathBuf> {
    let mut private = fs::DirBuilder::new();
    private.mode(0o700);
    if !parent.is_dir() {
        private.recursive(true).create(parent)?;
        private.recursive(false);
    }
    let path = parent.join(name);
    private.create(&path)?;
    Ok(path)
}

/// A place for the images of one dump; removed with this, except for logs where CRIU failed.
#[derive(Debug)]
pub(super) struct DumpPlace {
    root: PathBuf,
    keep_logs: bool,
    // Root of the tree by which action scripts may find this.
    registered: Option<u32>,
}

impl DumpPlace {
    /// Makes the directory `parent/name`, mode 0700.
    pub(super) fn create(parent: &Path, name: &str) -> std::io::Result<Self> {
        let root = private_directory(parent, name)?;
        private_directory(&root, "images")?;
        Ok(Self {
            root,
            keep_logs: false,
            registered: None,
        })
    }

    pub(super) fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Action scripts of CRIU find this by the root of the tree.
    pub(super) fn serves(&mut self, root: u32) {
        self.registered = Some(root);
    }

    /// The logs stay when this is dropped.
    pub(super) fn keep_logs(&mut self) {
        self.keep_logs = true;
    }

    /// The id of the dump, by which CRIU names its network lock.
    pub(super) fn run_id(images: &Path) -> Option<String> {
        let bytes = fs::read(images.join("inventory.img")).ok()?;
        Inventory::parse(&bytes, "inventory.img").ok()?.criu_run_id
    }

    /// CRIU's own figures, written when the dump has ended well.
    pub(super) fn stats(&self) -> Option<DumpStats> {
        let places = [self.root.clone(), self.root.join("work")];
        let mut read = places
            .iter()
            .filter_map(|place| fs::read(place.join("stats-dump")).ok());
        let bytes = read.next()?;
        DumpStats::parse(&bytes, "stats-dump").ok()
    }
}

impl Drop for DumpPlace {
    fn drop(&mut self) {
        if let Some(root) = self.registered {
            action::unregister(root, &self.root);
            scripts::remove(&self.root);
        }
        let _ = fs::remove_dir_all(self.images());
        if !self.keep_logs {
            let _ = fs::remove_dir_all(&self.root);
        }
    }
}

/// A dump under way.
#[derive(Debug)]
pub(super) struct Frozen {
    verdict: blocking::Sender<Verdict>,
    canceller: Ender,
    given_away: Arc<AtomicBool>,
}

impl Frozen {
    /// How the dump ends: the tree is killed, or runs on.
    pub(super) fn end(&self, verdict: Verdict) {
        if verdict == Verdict::Refuse {
            self.canceller.cancel();
        }
        // Fails where the dump has ended already.
        let _ = self.verdict.send(verdict);
    }

    /// From now on the tree is not to run again by this being dropped: it is held by its fence.
    pub(super) fn give_away(&self, is_given: bool) {
        self.given_away.store(is_given, Ordering::Release);
    }

    /// Kills CRIU, which does not do what it is told.
    pub(super) fn kill_criu(&self) {
        self.canceller.kill();
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if self.given_away.load(Ordering::Acquire) {
            // CRIU would let it run. The fence holds it, and whoever reads the journal goes on.
            self.canceller.kill();
        } else {
            // Whatever ends the migration early must not leave the tree frozen.
            self.end(Verdict::Refuse);
        }
    }
}

/// What ends a dump from another thread.
#[derive(Debug)]
enum Ender {
    Own(Canceller),
    Command(command::Canceller, DoorKeeper),
}

impl Ender {
    fn cancel(&self) {
        match self {
            Self::Own(canceller) => canceller.cancel(),
            Self::Command(canceller, keeper) => {
                canceller.cancel();
                keeper.close();
            }
        }
    }

    fn kill(&self) {
        match self {
            Self::Own(canceller) => canceller.kill(),
            Self::Command(canceller, keeper) => {
                canceller.kill();
                keeper.close();
            }
        }
    }
}

/// Who dumps, and where its memory comes from.
#[derive(Debug)]
pub(super) enum Dumper {
    /// A CRIU of our own.
    Own(Prepared),
    /// A command, which is started at the freeze.
    Command(Box<DumpCommand>),
}

/// What a freeze needs, made before it.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) worker: Worker,
    pub(super) socket: std::os::unix::net::UnixStream,
    pub(super) probe: Probe,
}

/// Starts CRIU and lets it look around, so that none of that is left for the freeze.
pub(super) fn prepare(program: &Path) -> Result<Prepared, CriuError> {
    let pair = page_client::socket_pair();
    let (socket, theirs) = pair.map_err(CriuError::io("make a socket for memory"))?;
    let mut worker = Worker::start(program, Some(theirs), None)?;
    let probe = worker.probe()?;
    // CRIU looks at its own socket only at a stage, at this one while it dumps memory.
    let copy = socket.try_clone().map_err(|source| CriuError::Io {
        pid: worker.pid(),
        action: "duplicate the socket for memory",
        source,
    })?;
    worker.end_with(copy.into());
    Ok(Prepared {
        worker,
        socket,
        probe,
    })
}

/// What to dump.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) pid: u32,
    pub(super) number: u32,
    pub(super) page: PageSize,
    pub(super) criu: CriuOptions,
    pub(super) images: PathBuf,
    pub(super) work: PathBuf,
    /// The pre-dump that this one builds on.
    pub(super) parent: Option<Parent>,
    /// Where it is recorded that the tree is frozen, before it is.
    pub(super) record: Option<Arc<Records>>,
    /// Of the migration.
    pub(super) name: String,
    /// What a command is told of the options.
    pub(super) words: String,
}

/// A dump that is about to begin.
#[derive(Debug)]
pub(super) enum Ready {
    Own(Worker, std::os::unix::net::UnixStream),
    Command(command::External, Door),
}

impl Ready {
    /// The process to wait for: CRIU itself, or the command that will start it.
    pub(super) fn pid(&self) -> u32 {
        match self {
            Self::Own(worker, _) => worker.pid(),
            Self::Command(external, _) => external.leader().pid,
        }
    }

    pub(super) fn leader(&self) -> Option<Process> {
        match self {
            Self::Own(..) => None,
            Self::Command(external, _) => Some(external.leader()),
        }
    }
}

/// Starts what is to be started for `job`; nothing of it touches the tree yet.
pub(super) fn ready(job: &Job, dumper: Dumper) -> Result<Ready, CriuError> {
    let dump = match dumper {
        Dumper::Own(Prepared { worker, socket, .. }) => return Ok(Ready::Own(worker, socket)),
        Dumper::Command(dump) => dump,
    };
    let door = Door::open().map_err(CriuError::io("listen for memory"))?;
    let address = door.address().map_err(CriuError::io("listen for memory"))?;
    let variables = vec![
        ("CRXFER_PID", job.pid.to_string()),
        ("CRXFER_NAME", job.name.clone()),
        ("CRXFER_CONTAINER", dump.container.clone()),
        ("CRXFER_OPTIONS", job.words.clone()),
        ("CRXFER_PAGE_SERVER_ADDRESS", address.ip().to_string()),
        ("CRXFER_PAGE_SERVER_PORT", address.port().to_string()),
    ];
    let external = command::External::start(
        crate::criu::Operation::Dump,
        &dump.command,
        &job.work,
        &job.images,
        variables,
        &dump.action,
    )?;
    action::register(job.pid, &job.work).map_err(CriuError::io("note where action scripts ask"))?;
    Ok(Ready::Command(external, door))
}

/// Freezes and dumps. Returns at once; `tell` hears of everything that follows, from both threads.
pub(super) fn freeze(
    job: Job,
    ready: Ready,
    outgoing: Outgoing,
    stream: RecordStream,
    clock: Clock,
    tell: impl Fn(Moment) + Clone + Send + 'static,
) -> std::io::Result<Frozen> {
    let (verdict, verdicts) = blocking::channel();
    let (canceller, runner, source) = match ready {
        Ready::Own(worker, socket) => (
            Ender::Own(worker.canceller()),
            Runner::Own(worker),
            MemorySource::Pair(socket),
        ),
        Ready::Command(external, door) => (
            Ender::Command(external.canceller(), door.keeper()),
            Runner::Command(external, door.keeper()),
            MemorySource::Door(door),
        ),
    };
    let frozen = Frozen {
        verdict,
        canceller,
        given_away: Arc::default(),
    };
    let given_away = frozen.given_away.clone();
    let (page, number) = (job.page, job.number);
    let comparer = Comparer {
        outgoing,
        stream,
        number,
        compared: Compared::default(),
        records: Vec::new(),
    };
    let held = job.parent.as_ref();
    let held = held.map_or_else(BTreeSet::new, |parent| parent.held.clone());
    let (begins, told) = (tell.clone(), tell.clone());
    let intake = move |pieces| Intake {
        pieces,
        begins: Some(Box::new(move || {
            begins(Moment::MemoryBegins {
                at_ns: clock.now_ns(),
            });
        })),
        held,
    };
    std::thread::Builder::new()
        .name("memory".to_owned())
        .spawn(move || take_memory(intake, comparer, source, page, clock, &told))?;
    std::thread::Builder::new()
        .name("dump".to_owned())
        .spawn(move || dump(&job, runner, &verdicts, clock, &given_away, &tell))?;
    Ok(frozen)
}

// None where the root is gone: then there is nothing to stop.
fn processes_below(root: u32) -> Vec<Process> {
    Tree::below(root).map_or_else(|_| Vec::new(), |tree| tree.processes)
}

/// What dumps.
#[derive(Debug)]
enum Runner {
    Own(Worker),
    Command(command::External, DoorKeeper),
}

#[derive(Debug)]
enum MemorySource {
    Pair(std::os::unix::net::UnixStream),
    Door(Door),
}

impl MemorySource {
    fn wait(self) -> Option<Memory> {
        match self {
            Self::Pair(socket) => Some(Memory::Pair(socket)),
            Self::Door(door) => door.wait(),
        }
    }
}

impl Runner {
    fn run(
        &mut self,
        job: &Job,
        decide: &mut dyn FnMut(Stage, Option<Process>, Option<Images>) -> Verdict,
    ) -> Result<(), CriuError> {
        match self {
            Self::Own(worker) => dump_by(worker, job, decide),
            Self::Command(external, keeper) => {
                let done = external.run(&mut |report| {
                    if report.stage != Stage::PostDump {
                        return decide(report.stage, report.criu, None);
                    }
                    let has_memory = keeper.is_in(&report.images);
                    let images = report.images.clone();
                    let images = Some(images).map(|path| Images { path, has_memory });
                    decide(report.stage, report.criu, images)
                });
                keeper.close();
                done
            }
        }
    }
}

fn dump_by(
    worker: &mut Worker,
    job: &Job,
    decide: &mut dyn FnMut(Stage, Option<Process>, Option<Images>) -> Verdict,
) -> Result<(), CriuError> {
    let open = |path: &Path| {
        File::open(path).map_err(|source| CriuError::Io {
            pid: worker.pid(),
            action: "open the directory of the images",
            source,
        })
    };
    let (images, work) = (open(&job.images)?, open(&job.work)?);
    let mut options = DumpOptions::new(job.pid, images.as_fd(), work.as_fd(), job.criu.clone());
    options.page_server = true;
    if let Some(parent) = &job.parent {
        options.parent = Some(parent.link.clone());
        options.track_mem = true;
        options.pidfd_store = parent.pidfds.as_ref().map(|socket| socket.as_fd());
    }
    let done = worker.dump(&options, &mut |stage, _| decide(stage, None, None));
    done.map(drop)
}

fn dump(
    job: &Job,
    mut runner: Runner,
    verdicts: &blocking::Receiver<Verdict>,
    clock: Clock,
    given_away: &AtomicBool,
    tell: &impl Fn(Moment),
) {
    let mut unrecorded = None;
    let result = runner.run(job, &mut |stage, criu, images| match stage {
        Stage::PreDump => {
            let record = job.record.as_ref();
            let recorded = record.map(|record| {
                if criu.is_some() {
                    record.dumps_by(criu)?;
                }
                record.freezing(job.pid)
            });
            if let Some(Err(error)) = recorded {
                unrecorded = Some(error);
                return Verdict::Refuse;
            }
            pause::at("freezing");
            tell(Moment::Freezing {
                at_ns: clock.now_ns(),
            });
            Verdict::GoOn
        }
        Stage::PostDump => {
            // Should CRIU die now, the tree does not run with what CRIU has done to its sockets.
            let tree = processes_below(job.pid);
            hold::stop(&tree);
            tell(Moment::Held {
                at_ns: clock.now_ns(),
                images,
            });
            // Whoever would answer is gone: the tree runs on.
            let verdict = verdicts.recv().unwrap_or(Verdict::Refuse);
            if verdict == Verdict::Refuse {
                hold::release(&tree);
            }
            verdict
        }
        _ => Verdict::GoOn,
    });
    // A CRIU that died in the middle may have left code of its own in the tree, and locks on its
    // sockets: nothing runs until both are healed, by whoever ends this migration. Not a tree that was
    // given away: the fence holds it, or it was healed already, and nobody would wake it again.
    let is_ours = !given_away.load(Ordering::Acquire);
    if is_ours && result.as_ref().is_err_and(CriuError::has_died) {
        hold::stop(&processes_below(job.pid));
    }
    let result = match unrecorded {
        Some(error) => Err(error.into()),
        None => result.map_err(MigrateError::from),
    };
    tell(Moment::Ended { result });
}

// Two threads: while one copies memory out of CRIU's socket, the other hashes and compares.
fn take_memory(
    intake: impl FnOnce(blocking::SyncSender<Piece>) -> Intake,
    mut comparer: Comparer,
    source: MemorySource,
    page: PageSize,
    clock: Clock,
    tell: &impl Fn(Moment),
) {
    let (pieces, inbox) = blocking::sync_channel(PIECES_WAITING);
    let (served, compared) = std::thread::scope(|scope| {
        let comparing = scope.spawn(|| comparer.run(inbox));
        let mut intake = intake(pieces);
        let served = match source.wait() {
            Some(memory) => memory.serve(page, &mut intake),
            None => Err("the dump ended without any".into()),
        };
        // CRIU must not wait for a socket that nobody reads, nor the comparer for more; the former is
        // dropped by now.
        drop(intake);
        (served, comparing.join().expect("comparing does not panic"))
    });
    // What failed first is why the other one ended.
    let result = compared
        .map_err(|error| error.to_string())
        .and_then(|()| served.map_err(|error| error.to_string()))
        .map(|_| comparer.compared);
    tell(Moment::MemoryEnds {
        at_ns: clock.now_ns(),
        outgoing: Box::new(comparer.outgoing),
        result,
    });
}

/// Pieces of memory that were read and wait for being compared: 8 MiB at most.
const PIECES_WAITING: usize = 8;

/// What CRIU's stream says, in order.
#[derive(Debug)]
enum Piece {
    Open(PagemapName),
    Pages(Batch, Bytes),
    InParent(PagemapName, PageRun),
}

/// Where CRIU's memory goes.
struct Intake {
    pieces: blocking::SyncSender<Piece>,
    /// Called when memory begins to come.
    begins: Option<Box<dyn FnOnce()>>,
    /// Tasks of which the destination holds what CRIU may leave out.
    held: BTreeSet<PagemapName>,
}

impl Intake {
    fn pass_on(&self, piece: Piece) -> Result<(), SinkError> {
        let sent = self.pieces.send(piece);
        sent.map_err(|_| "its comparison has ended".into())
    }
}

impl PageSink for Intake {
    fn open(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        if let Some(begins) = self.begins.take() {
            begins();
        }
        self.pass_on(Piece::Open(space))?;
        Ok(self.held.contains(&space))
    }

    fn has_parent(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        Ok(self.held.contains(&space))
    }

    fn pages(&mut self, batch: &Batch, bytes: Bytes) -> Result<(), SinkError> {
        self.pass_on(Piece::Pages(*batch, bytes))
    }

    fn elsewhere(&mut self, space: PagemapName, run: PageRun) -> Result<(), SinkError> {
        if run.flags != PageFlags::PARENT {
            return Err("CRIU kept pages back".into());
        }
        self.pass_on(Piece::InParent(space, run))
    }

    // That all could be compared is not waited for: the vote at post-dump counts.
    fn close(&mut self) -> Result<i32, SinkError> {
        Ok(0)
    }
}

/// Compares the memory of the dump with what the destination holds.
#[derive(Debug)]
struct Comparer {
    outgoing: Outgoing,
    stream: RecordStream,
    number: u32,
    compared: Compared,
    records: Vec<Record>,
}

impl Comparer {
    fn run(&mut self, pieces: blocking::Receiver<Piece>) -> Result<(), SinkError> {
        self.outgoing.begin(self.number, true, &mut self.records);
        for piece in pieces {
            self.take(piece)?;
            if !self.records.is_empty() {
                self.stream.put(self.number, &mut self.records)?;
            }
        }
        self.stream.put(self.number, &mut self.records)?;
        Ok(())
    }

    fn take(&mut self, piece: Piece) -> Result<(), SinkError> {
        let records = &mut self.records;
        match piece {
            Piece::Open(space) => self.outgoing.open_dumped(space, records),
            Piece::Pages(batch, bytes) => {
                let (space, flags) = (batch.space, batch.flags);
                self.compared +=
                    self.outgoing
                        .dumped_pages(space, batch.vaddr, flags, &bytes, records);
            }
            Piece::InParent(space, run) => {
                self.outgoing
                    .dumped_in_parent(space, run.vaddr, run.pages, records)?;
            }
        }
        Ok(())
    }
}

/// Puts all other images of the dump onto the stream, and ends it. Blocks.
pub(super) fn send_images(
    images: &Path,
    page: PageSize,
    number: u32,
    outgoing: &mut Outgoing,
    stream: &RecordStream,
    has_memory: bool,
) -> std::io::Result<u64> {
    let mut names = Vec::new();
    for entry in fs::read_dir(images)? {
        let entry = entry?;
        // Not CRIU's link to the pre-dump: the destination's directory has a parent of its own.
        let is_sent = |name: &str| {
            let is_memory = name.starts_with("pagemap-") || name.starts_with("pages-");
            name != POINTER && !(has_memory && is_memory)
        };
        if entry.file_type()?.is_file() && is_sent(&entry.file_name().to_string_lossy()) {
            names.push(entry.file_name());
        }
    }
    names.sort();
    let ended = |error| std::io::Error::new(std::io::ErrorKind::BrokenPipe, error);
    let mut records = Vec::new();
    let mut total = 0;
    for name in names {
        let mut file = File::open(images.join(&name))?;
        let about = file.metadata()?;
        let mode = u16::try_from(about.permissions().mode() & 0o777).expect("nine bits");
        let name = FileName::new(name.to_string_lossy()).map_err(std::io::Error::other)?;
        let meta = FileMeta::new(name, mode, about.len(), page);
        let mut sending = outgoing.begin_file(meta, &mut records);
        while let Some(part) = sending.next_part() {
            let mut bytes = vec![0; part];
            file.read_exact(&mut bytes)?;
            outgoing.file_part(&mut sending, bytes, &mut records);
            stream.put(number, &mut records).map_err(ended)?;
        }
        outgoing.end_file(sending);
        total += about.len();
    }
    outgoing.end(&mut records);
    stream.put(number, &mut records).map_err(ended)?;
    Ok(total)
}
