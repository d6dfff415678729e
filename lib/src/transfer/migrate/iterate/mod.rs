//! Where the memory of the running tree comes from, iteration by iteration.
//!
//! ```text
//!  Live      reads the running tree from outside; stops nobody; any kernel
//!  PreDumps  CRIU pre-dumps with soft-dirty; stops the tree briefly; the final dump builds on them
//!  Dumps     image directories that an embedder has made, such as of a container runtime
//!     │
//!     └──── pages ──▶ Outgoing (what does the destination lack?) ──▶ stream
//! ```
//!
//! Whichever it is, what the destination gets is decided by content, so a source may give a page too
//! often, late or torn. Only a final dump that builds on pre-dumps takes the kernel's word for what
//! has not changed.

mod dumps;
mod live;
mod pre_dump;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::MigrateError;
use super::stream::{RecordStream, StreamEnded};
use crate::criu::CriuError;
use crate::delta::{Compared, Outgoing, Record};
use crate::image::PagemapName;
use crate::live::ReaderOptions;
use crate::page::PageSize;

pub(super) use dumps::ReadDumps;
pub(super) use live::Live;
pub(super) use pre_dump::{Parent, PreDumps, Setup};

/// How memory is copied while the tree runs.
#[derive(Clone, Debug, Default)]
pub enum Precopy {
    /// By pre-dumps where CRIU and kernel can track what is written (soft-dirty), else live.
    ///
    /// Pre-dumps stop the tree for milliseconds at each iteration, and make the last stop shorter:
    /// CRIU then hands out only what was written since the last one. Where the first pre-dump fails,
    /// memory is read live.
    #[default]
    Auto,
    /// Read from outside: the tree is not stopped, on any kernel.
    Live,
    /// By pre-dumps only; an error where there is no soft-dirty.
    PreDump,
    /// From dumps that the caller has made.
    Dumps(Dumps),
}

/// Image directories of the running tree, made by somebody else: one for each iteration.
///
/// Where crxfer shall not read the tree itself, or a runtime has dumps anyway. Each directory may
/// build on the ones before by its `parent` link. The final dump is crxfer's own and is compared
/// with what was given by content, so that a dump may be of any age, and may lack memory.
///
/// ```
/// use std::path::PathBuf;
/// use std::process::Command;
/// use crxfer::transfer::migrate::{Dumps, Precopy};
///
/// let dumps = Dumps::new(|number| {
///     if number > 3 {
///         // Nothing more: the tree is frozen now.
///         return Ok(None);
///     }
///     let images = PathBuf::from(format!("/run/web/dump-{number}"));
///     let mut runc = Command::new("runc");
///     runc.args(["checkpoint", "--leave-running", "--image-path"]).arg(&images).arg("web");
///     if !runc.status()?.success() {
///         return Err(std::io::Error::other("runc checkpoint failed"));
///     }
///     Ok(Some(images))
/// });
/// let precopy = Precopy::Dumps(dumps);
/// # drop(precopy);
/// ```
#[derive(Clone)]
pub struct Dumps(Arc<Mutex<NextDump>>);

type NextDump = dyn FnMut(u32) -> io::Result<Option<PathBuf>> + Send;

impl Dumps {
    /// `next` is asked before each iteration, with its number (from 1), on a thread where it may
    /// block. It gives the directory of a new dump, which must stay as it is until the next call, or
    /// `None` where there are no more: then the tree is frozen. An error ends the migration; the
    /// tree runs on.
    pub fn new(next: impl FnMut(u32) -> io::Result<Option<PathBuf>> + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(next)))
    }
}

impl fmt::Debug for Dumps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dumps")
    }
}

/// Reads memory while the tree runs. Calls come from one thread after another, and may block.
pub(super) trait PrecopySource: Send {
    /// How it reads, for reports. May change with an iteration.
    fn method(&self) -> &'static str;

    /// Before iteration `number`. False where there is nothing more to read: then the tree is frozen.
    fn prepare(&mut self, number: u32) -> Result<bool, MigrateError> {
        let _ = number;
        Ok(true)
    }

    /// Reads the memory once and puts it on the stream. A stream that was stopped or has ended is no
    /// error: then what was read so far is an iteration.
    fn read(&mut self, pass: &mut Pass<'_>) -> Result<Read, MigrateError>;

    /// What the final dump may build on, once the last iteration is stored. Nothing is read after it.
    fn into_parent(self: Box<Self>) -> Option<Parent> {
        None
    }
}

/// What one reading came to, beside what its [`Pass`] counts.
#[derive(Clone, Debug, Default)]
pub(super) struct Read {
    /// Time that reading took, with waits for the link, without those for a rate limit.
    pub(super) took: Duration,
    /// How long the tree stood still for it.
    pub(super) frozen: Option<Duration>,
    /// The final dump may build on it.
    pub(super) is_parent: bool,
    /// What the operator should know.
    pub(super) note: Option<String>,
}

/// What one iteration came to.
#[derive(Clone, Debug)]
pub(super) struct Scanned {
    pub(super) read: Read,
    pub(super) compared: Compared,
    /// Pages that were compared, or are known not to have changed.
    pub(super) covered: u64,
    /// Time in which the stream was waited for.
    pub(super) link_wait: Duration,
}

/// Where records go: the stream to the destination, or a test.
pub(super) trait Outlet: Sync {
    /// Puts records of iteration `number`; waits while there is no room.
    fn put(&self, number: u32, records: &mut Vec<Record>) -> Result<(), StreamEnded>;

    /// Whether the iteration shall end early.
    fn is_stopped(&self) -> bool;
}

impl Outlet for RecordStream {
    fn put(&self, number: u32, records: &mut Vec<Record>) -> Result<(), StreamEnded> {
        RecordStream::put(self, number, records)
    }

    fn is_stopped(&self) -> bool {
        RecordStream::is_stopped(self)
    }
}

/// An iteration under way: pages go in, what the destination lacks goes onto the stream.
pub(super) struct Pass<'a> {
    pub(super) number: u32,
    pub(super) outgoing: &'a mut Outgoing,
    pub(super) outlet: &'a dyn Outlet,
    /// Told of pages covered and changed.
    pub(super) progress: &'a mut dyn FnMut(u64, u64),
    pub(super) compared: Compared,
    pub(super) covered: u64,
    records: Vec<Record>,
}

impl<'a> Pass<'a> {
    /// Begins iteration `number`.
    pub(super) fn begin(
        number: u32,
        outgoing: &'a mut Outgoing,
        outlet: &'a dyn Outlet,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        let mut records = Vec::new();
        outgoing.begin(number, false, &mut records);
        Self {
            number,
            outgoing,
            outlet,
            progress,
            compared: Compared::default(),
            covered: 0,
            records,
        }
    }

    /// Compares whole pages and sends what changed. False where reading shall end.
    pub(super) fn pages(&mut self, space: PagemapName, address: u64, bytes: &[u8]) -> bool {
        let compared = self
            .outgoing
            .pages(space, address, bytes, &mut self.records);
        self.compared += compared;
        self.covered(compared.pages)
            && self.outlet.put(self.number, &mut self.records).is_ok()
            && !self.is_stopped()
    }

    /// Takes note of pages that need not be compared. False where reading shall end.
    pub(super) fn covered(&mut self, pages: u64) -> bool {
        self.covered += pages;
        (self.progress)(self.covered, self.compared.changed);
        !self.is_stopped()
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.outlet.is_stopped()
    }

    /// All that was read is on the stream.
    pub(super) fn end(mut self) {
        self.outgoing.end(&mut self.records);
        // An ended stream is reported by its writer.
        let _ = self.outlet.put(self.number, &mut self.records);
    }
}

/// Does one iteration. Blocks.
pub(super) fn iterate(
    source: &mut dyn PrecopySource,
    outgoing: &mut Outgoing,
    stream: &RecordStream,
    number: u32,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Scanned, MigrateError> {
    stream.arrived();
    let busy_before = stream.written().busy();
    let mut pass = Pass::begin(number, outgoing, stream, progress);
    let read = source.read(&mut pass)?;
    let (compared, covered) = (pass.compared, pass.covered);
    pass.end();
    let _ = stream.drained();
    Ok(Scanned {
        read,
        compared,
        covered,
        link_wait: stream.written().busy().saturating_sub(busy_before),
    })
}

/// Opens the source that `precopy` asks for. Blocks.
pub(super) fn open(
    precopy: &Precopy,
    page: PageSize,
    reader: ReaderOptions,
    setup: Setup,
) -> Result<Box<dyn PrecopySource>, MigrateError> {
    let by_pre_dumps = match precopy {
        Precopy::Dumps(dumps) => return Ok(Box::new(ReadDumps::new(dumps.clone(), page))),
        Precopy::Live => false,
        Precopy::PreDump if setup.is_possible() => true,
        Precopy::PreDump => return Err(CriuError::NoSoftDirty.into()),
        Precopy::Auto => setup.is_possible(),
    };
    let pid = setup.pid;
    if by_pre_dumps {
        let must = matches!(precopy, Precopy::PreDump);
        Ok(Box::new(PreDumps::open(setup, must, page, reader)?))
    } else {
        Ok(Box::new(Live::open(pid, page, reader)?))
    }
}

#[cfg(test)]
mod tests;
