//! CRIU's page-server clients against `crxfer page-server`: what they dump arrives, becomes a complete
//! set with `crxfer send`, and is restored; and whatever is killed, the program runs on.

mod endpoint;
mod faults;
mod feeds;
mod runc;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use self::endpoint::Endpoint;
use super::{Context, Report, Scope};
use crate::apt;
use crate::criu::{self, Criu, End};
use crate::crxfer::{Place, Receiver};
use crate::hosts::{Hosts, Rate};
use crate::run;
use crate::scratch::Scratch;
use crate::workload::{Memcached, Tree, Values, Workload};

/// Name of the set.
const NAME: &str = "web";

pub(super) fn cases(context: &Context, report: &mut Report) {
    let Some(criu) = &context.criu else { return };
    let values = if context.scope == Scope::Quick {
        2_000
    } else {
        6_000
    };
    let memcached = |_: &Path| -> Box<dyn Workload> {
        // Ground to compare: 8 KiB each.
        Box::new(Memcached::new(Values::new(values, 8192), 50))
    };
    let tree = |place: &Path| -> Box<dyn Workload> { Box::new(Tree::new(place.to_owned())) };
    let mut case = |name: &str, criu: &Criu, way, store, make: Maker<'_>| {
        report.case(name, || Case::new(criu, store, make)?.run(context, way));
    };
    use Store::{Disk, Memory};
    use Way::{PreDump, Socket, Tcp};
    case(
        "page-server: memcached over TCP to disk",
        criu,
        Tcp,
        Disk,
        &memcached,
    );
    case(
        "page-server: memcached over TCP to memory",
        criu,
        Tcp,
        Memory,
        &memcached,
    );
    case(
        "page-server: memcached over one socket to disk",
        criu,
        Socket,
        Disk,
        &memcached,
    );
    case(
        "page-server: tree over one socket to memory",
        criu,
        Socket,
        Memory,
        &tree,
    );
    if criu.tracks_writes() {
        case(
            "page-server: memcached with pre-dumps",
            criu,
            PreDump,
            Disk,
            &memcached,
        );
    } else {
        println!("  page-server with pre-dumps: skipped, this kernel does not track writes");
    }
    match run::target().and_then(|target| criu::ensure_older(&target)) {
        Ok(older) => case("page-server: tree, CRIU 4.1", &older, Tcp, Disk, &tree),
        Err(error) => println!("  page-server with CRIU 4.1: skipped: {error:#}"),
    }
    faults::cases(context, criu, report);
    feeds::cases(context, criu, report);
    runc::cases(context, report);
}

/// Makes a workload that keeps its files in the given directory.
type Maker<'a> = &'a dyn Fn(&Path) -> Box<dyn Workload>;

/// How CRIU reaches the endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A connection for each dump.
    Tcp,
    /// One socket that both inherit.
    Socket,
    /// A connection for each pre-dump and dump, which tell what was written since the one before.
    PreDump,
}

/// Where the destination keeps the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Store {
    Disk,
    Memory,
}

/// A program on one of two hosts.
struct Case<'a> {
    criu: &'a Criu,
    hosts: Hosts,
    scratch: Scratch,
    /// Where the set arrives.
    received: PathBuf,
    _memory: Option<Scratch>,
    workload: Box<dyn Workload>,
    pid: u32,
}

impl<'a> Case<'a> {
    fn new(criu: &'a Criu, store: Store, make: Maker<'_>) -> Result<Self> {
        apt::ensure(&[apt::MEMCACHED])?;
        let scratch = Scratch::new("page-server")?;
        let memory = match store {
            Store::Disk => None,
            Store::Memory => Some(Scratch::within(Path::new("/dev/shm"), "page-server")?),
        };
        let received = memory.as_ref().unwrap_or(&scratch).path().join("received");
        let hosts = Hosts::new(Rate::Unlimited)?;
        let mut workload = make(&scratch.directory("workload")?);
        let pid = workload.start(&hosts.a)?;
        Ok(Self {
            criu,
            hosts,
            scratch,
            received,
            _memory: memory,
            workload,
            pid,
        })
    }

    fn receive(&self, context: &Context) -> Result<Receiver> {
        let place = Place::On(&self.hosts.b);
        context
            .crxfer
            .receive(place, &self.received, "faithful", &[])
    }

    /// A dump, a dump of what was changed since, the other images; then it lives on the other host.
    fn run(mut self, context: &Context, way: Way) -> Result<String> {
        let receiver = self.receive(context)?;
        let endpoint = match way {
            Way::Socket => Endpoint::inherited(context, &self.hosts.a, &self.scratch, &receiver)?,
            Way::Tcp | Way::PreDump => {
                Endpoint::listening(context, &self.hosts.a, &self.scratch, &receiver, &[])?
            }
        };
        let first = self.dump(&endpoint, way, 1, End::LeaveRunning)?;
        self.workload
            .check(&self.hosts.a)
            .context("between dumps")?;
        self.workload.write(&self.hosts.a)?;
        let second = self.dump(&endpoint, way, 2, End::Kill)?;
        ensure!(
            second.fresh_pages < first.pages,
            "{} of {} pages count as new in the second dump",
            second.fresh_pages,
            second.pages
        );
        ensure!(second.generation == first.generation + 1, "{second:?}");
        let frozen = frozen_ms(&self.images(2))?;
        endpoint.stop()?;
        let sent = context
            .crxfer
            .send(Place::On(&self.hosts.a), &self.images(2), &receiver, NAME)
            .with_context(|| format!("crxfer recv said:\n{}", receiver.said()))?;
        ensure!(
            sent.completeness == "complete",
            "it is {}",
            sent.completeness
        );
        self.restore(&self.received.join(NAME))?;
        Ok(format!(
            "{} pages, then {} new; the second dump froze it for {frozen:.0} ms",
            first.pages, second.fresh_pages
        ))
    }

    fn images(&self, number: u32) -> PathBuf {
        self.scratch.path().join(format!("images/{number}"))
    }

    fn dump(
        &self,
        endpoint: &Endpoint,
        way: Way,
        number: u32,
        end: End,
    ) -> Result<endpoint::Taken> {
        let images = self.images(number);
        let (host, pid) = (&self.hosts.a, self.pid);
        let mut words = endpoint.words();
        let parent = format!("../{}", number - 1);
        if way == Way::PreDump && number > 1 {
            words.extend(["--track-mem", "--prev-images-dir", &parent].map(str::to_owned));
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        if way == Way::PreDump && end == End::LeaveRunning {
            self.criu.pre_dump_with(host, pid, &images, &words)
        } else {
            self.criu.dump(host, pid, &images, end, &words)
        }
        .with_context(|| endpoint.said())?;
        let taken = endpoint.taken()?;
        let pages = fs::read_dir(&images)?.flatten().any(|entry| {
            let name = entry.file_name();
            name.to_string_lossy().starts_with("pages-")
        });
        ensure!(!pages, "pages are among the images of the source");
        Ok(taken)
    }

    fn restore(&self, set: &Path) -> Result<()> {
        let work = self.scratch.path().join("restore");
        self.criu.restore(&self.hosts.b, set, &work)?;
        let compared = self.workload.check(&self.hosts.b);
        self.hosts.b.end(self.pid)?;
        ensure!(
            compared.context("after the restore")? > 0,
            "nothing was compared"
        );
        Ok(())
    }
}

/// CRIU's own figure of how long the tree stood still.
fn frozen_ms(images: &Path) -> Result<f64> {
    let stats = fs::read(images.join("stats-dump"))?;
    // Magics and a length; then field 1, the dump's, of which field 2 is the frozen time in µs.
    let dump = stats.get(14..).context("stats-dump is too short")?;
    let mut at = 0;
    while let Some(key) = number(dump, &mut at) {
        let value = number(dump, &mut at).context("stats-dump is damaged")?;
        if key == 2 << 3 {
            #[expect(clippy::cast_precision_loss, reason = "shown, rounded")]
            return Ok(value as f64 / 1e3);
        }
    }
    anyhow::bail!("stats-dump has no frozen time")
}

/// A number of 7 bits a byte at `at`.
fn number(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0;
    for shift in (0..63).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}
