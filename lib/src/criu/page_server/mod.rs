//! The page-server protocol: how a dumping CRIU sends memory, as a state machine without I/O.
//!
//! ```text
//!  C ▶ OPEN2(task 171)        C ▶ ADD_F(present, 2 pages) + 8 KiB      C ▶ CLOSE
//!  S ◀ has a parent? 1 byte   C ▶ ADD_F(in parent, 40 pages)           S ◀ status, int32
//! ```
//!
//! [`PageServer`] reads headers and says what comes next; it never sees a byte of page data. The
//! driver asks what is [wanted](PageServer::wants) and either passes on header bytes, or reads one
//! [`Batch`] of pages straight to where they shall be. So page data is moved once, by the kernel.
//!
//! There are no checksums and no versions. Whatever a confused or hostile peer sends ends in a
//! [`PageServerError`]; the driver then closes the socket, on which CRIU fails its dump and resumes
//! the tree. So does a status other than 0 in answer to CLOSE. A CLOSE, on the other hand, only says
//! that CRIU has no more to send; that the dump is good is said by CRIU's answer to the request.

mod header;

use std::collections::HashSet;

pub use header::HeaderLayout;
use header::{Collector, Header, Op};

use crate::image::pagemap::MAX_PAGES;
use crate::image::{PageFlags, PageRun, PagemapName};
use crate::page::PageSize;

/// Largest [`Batch`], in bytes; batches also never cross a multiple of it in the address space.
pub const BATCH_BYTES: u64 = 1 << 20;

/// Most tasks and shared segments in one session. Linux has at most 4 million tasks; trees that are
/// migrated have thousands.
pub const MAX_SPACES: usize = 1 << 17;

/// What a complete header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The memory of `space` follows. With `asks` CRIU waits for [`PageServer::answer_parent`].
    Open {
        /// Whose memory.
        space: PagemapName,
        /// Not from CRIU before 3.4.
        asks: bool,
    },
    /// CRIU asks whether `space` has a parent, and waits for [`PageServer::answer_parent`].
    Parent {
        /// Whose memory.
        space: PagemapName,
    },
    /// Pages of `space`. If they are present, their bytes follow as batches.
    Run {
        /// Whose memory.
        space: PagemapName,
        /// Which pages, and where their content is.
        run: PageRun,
    },
    /// There is no more; CRIU waits for [`PageServer::answer_close`].
    Close {
        /// CRIU was given its socket, and leaves it open.
        force: bool,
    },
}

/// What the driver does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Read so many bytes, or fewer, for [`PageServer::header`].
    Header(usize),
    /// Read exactly this batch, then call [`PageServer::batch_read`].
    Batch(Batch),
    /// Answer the last event.
    Answer,
    /// Nothing: the session is over.
    Nothing,
}

/// Whole pages of one run that follow in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Whose memory.
    pub space: PagemapName,
    /// Address of the first page (offset for shared segments).
    pub vaddr: u64,
    /// Number of pages, at least 1.
    pub pages: u64,
    /// Flags of the run: present, perhaps lazy.
    pub flags: PageFlags,
    /// Their bytes.
    pub len: usize,
    /// How many bytes of a header surely follow behind them; 0 if more of the run does. A driver
    /// saves a system call by reading both at once.
    pub header_follows: usize,
}

/// Bytes to send to CRIU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    bytes: [u8; 4],
    len: usize,
}

impl AsRef<[u8]> for Reply {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Why a stream of memory cannot be taken. The driver closes it; the dump fails and the tree resumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageServerError {
    /// Neither known layout of headers begins like that.
    #[error(
        "CRIU's memory stream does not begin as one; this CRIU is not known to crxfer (3.4 to 4.2 are)"
    )]
    BadBegin,
    /// An operation that no release sends in a dump.
    #[error("CRIU's memory stream: unknown operation {0:#x}")]
    UnknownOperation(u16),
    /// Compressed pages (the unreleased line after 4.2).
    #[error(
        "CRIU sends compressed memory, which cannot be compared by page. Take `compress` out of \
         CRIU's configuration files"
    )]
    Compressed,
    /// Neither a task nor a shared segment.
    #[error("CRIU's memory stream: {0:#x} is neither a task nor a shared segment")]
    BadSpace(u64),
    /// The same memory twice.
    #[error("CRIU's memory stream: {0} comes twice")]
    Twice(PagemapName),
    /// Too many.
    #[error("CRIU's memory stream: more than {MAX_SPACES} tasks and segments")]
    TooManySpaces,
    /// Pages of something that was not opened.
    #[error("CRIU's memory stream: pages of {0}, which is not open")]
    NotOpen(PagemapName),
    /// A run that breaks a rule of pagemaps.
    #[error("CRIU's memory stream: {space} at {vaddr:#x}: {what}")]
    BadRun {
        /// Whose memory.
        space: PagemapName,
        /// Where.
        vaddr: u64,
        /// Which rule.
        what: RunProblem,
    },
    /// A header has a field set that its operation has not.
    #[error("CRIU's memory stream: a header with more than its operation has")]
    BadHeader,
    /// The stream ends before CLOSE: CRIU failed, was killed, or was told to stop.
    #[error("CRIU's memory stream ends early, {0}; its log says why")]
    Cut(&'static str),
    /// The driver answers what was not asked: a bug of the caller.
    #[error("an answer to a question that CRIU did not ask")]
    NotAsked,
}

/// Which rule a run breaks.
pub use crate::image::RunFault as RunProblem;

/// The receiving side of one session.
#[derive(Debug)]
pub struct PageServer {
    page_size: PageSize,
    headers: Collector,
    state: State,
    /// The open space, where its last run ended, and its pages so far.
    open: Option<(PagemapName, u64, u64)>,
    seen: HashSet<PagemapName>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Header,
    /// The rest of a run whose bytes are in the stream.
    Data(PagemapName, PageRun),
    Asked(Question),
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    Open,
    Parent,
    Close,
}

impl PageServer {
    /// Before the first byte. `page_size` is that of the host that CRIU runs on.
    pub fn new(page_size: PageSize) -> Self {
        Self::following(page_size, None)
    }

    /// The same on a socket whose earlier session had this layout: a session that only closes does not
    /// show its own.
    pub fn following(page_size: PageSize, layout: Option<HeaderLayout>) -> Self {
        Self {
            page_size,
            headers: Collector::following(layout),
            state: State::Header,
            open: None,
            seen: HashSet::new(),
        }
    }

    /// The layout of this connection's headers, once it is known.
    pub fn layout(&self) -> Option<HeaderLayout> {
        self.headers.layout()
    }

    /// What the driver does next.
    pub fn wants(&self) -> Want {
        match self.state {
            State::Header => Want::Header(self.headers.missing()),
            State::Data(space, run) => Want::Batch(self.batch(space, run)),
            State::Asked(_) => Want::Answer,
            State::Closed => Want::Nothing,
        }
    }

    /// Takes bytes of a header: how many were taken, and what it says once it is whole.
    ///
    /// Takes nothing while anything but a header is [wanted](Self::wants).
    pub fn header(&mut self, input: &[u8]) -> Result<(usize, Option<Event>), PageServerError> {
        if self.state != State::Header {
            return Ok((0, None));
        }
        let (taken, header) = self.headers.take(input)?;
        let event = header.map(|header| self.event(&header)).transpose()?;
        Ok((taken, event))
    }

    /// The wanted batch was read.
    pub fn batch_read(&mut self) {
        let State::Data(space, run) = self.state else {
            return;
        };
        let batch = self.batch(space, run);
        let rest = PageRun {
            vaddr: run.vaddr.saturating_add(batch.len as u64),
            pages: run.pages - batch.pages,
            flags: run.flags,
        };
        self.state = match rest.pages {
            0 => State::Header,
            _ => State::Data(space, rest),
        };
    }

    /// Answers [`Event::Open`] or [`Event::Parent`].
    ///
    /// Yes is a promise: CRIU then leaves out pages that did not change since the parent, and only
    /// names them.
    pub fn answer_parent(&mut self, has_parent: bool) -> Result<Reply, PageServerError> {
        let len = match self.state {
            State::Asked(Question::Open) => 1,
            State::Asked(Question::Parent) => 4,
            _ => return Err(PageServerError::NotAsked),
        };
        self.state = State::Header;
        let bytes = if len == 1 {
            [u8::from(has_parent), 0, 0, 0]
        } else {
            i32::from(has_parent).to_ne_bytes()
        };
        Ok(Reply { bytes, len })
    }

    /// Answers [`Event::Close`]: 0 takes the memory, anything else makes CRIU fail and resume.
    pub fn answer_close(&mut self, status: i32) -> Result<Reply, PageServerError> {
        if self.state != State::Asked(Question::Close) {
            return Err(PageServerError::NotAsked);
        }
        self.state = State::Closed;
        Ok(Reply {
            bytes: status.to_ne_bytes(),
            len: 4,
        })
    }

    /// The peer's end of file: an error unless the session is over.
    pub fn end_of_stream(&self) -> Result<(), PageServerError> {
        match self.state {
            State::Closed => Ok(()),
            State::Data(..) => Err(PageServerError::Cut("inside a page")),
            State::Asked(_) => Err(PageServerError::Cut("before an answer")),
            State::Header if !self.headers.is_empty() => {
                Err(PageServerError::Cut("inside a header"))
            }
            State::Header => Err(PageServerError::Cut("without its CLOSE")),
        }
    }

    fn event(&mut self, header: &Header) -> Result<Event, PageServerError> {
        match header.op {
            Op::Open | Op::Open2 => {
                check_bare(header)?;
                self.open(header.space()?, header.op == Op::Open2)
            }
            Op::Parent => {
                check_bare(header)?;
                self.state = State::Asked(Question::Parent);
                let space = header.space()?;
                Ok(Event::Parent { space })
            }
            Op::Add => self.run(header, PageFlags::PRESENT.bits()),
            Op::Hole => self.run(header, PageFlags::PARENT.bits()),
            Op::AddF => self.run(header, header.flags),
            Op::Close | Op::ForceClose => {
                // Not the count: in a first header of unknown layout it may be padding.
                if (header.flags, header.vaddr) != (0, 0) {
                    return Err(PageServerError::BadHeader);
                }
                self.open = None;
                self.state = State::Asked(Question::Close);
                let force = header.op == Op::ForceClose;
                Ok(Event::Close { force })
            }
        }
    }

    fn open(&mut self, space: PagemapName, asks: bool) -> Result<Event, PageServerError> {
        if self.seen.len() >= MAX_SPACES {
            return Err(PageServerError::TooManySpaces);
        }
        // CRIU's own server takes the second for the whole and forgets the first; no CRIU sends one.
        if !self.seen.insert(space) {
            return Err(PageServerError::Twice(space));
        }
        self.open = Some((space, 0, 0));
        if asks {
            self.state = State::Asked(Question::Open);
        }
        Ok(Event::Open { space, asks })
    }

    fn run(&mut self, header: &Header, flags: u32) -> Result<Event, PageServerError> {
        let space = header.space()?;
        let Some((_, end, pages)) = self.open.as_mut().filter(|(open, ..)| *open == space) else {
            return Err(PageServerError::NotOpen(space));
        };
        let (vaddr, page_size) = (header.vaddr, self.page_size);
        let bad = |what| PageServerError::BadRun { space, vaddr, what };
        let run = checked_run(header, flags, *end, page_size).map_err(bad)?;
        *pages += run.pages;
        if *pages > MAX_PAGES {
            return Err(bad(RunProblem::Absurd(*pages)));
        }
        *end = run.end(page_size);
        if run.flags.is_present() {
            self.state = State::Data(space, run);
        }
        Ok(Event::Run { space, run })
    }

    /// The next pages of `run`, up to the next multiple of [`BATCH_BYTES`].
    fn batch(&self, space: PagemapName, run: PageRun) -> Batch {
        let page_bytes = self.page_size.bytes();
        // A page may be larger than a batch.
        let room = ((BATCH_BYTES - run.vaddr % BATCH_BYTES) / page_bytes).max(1);
        let pages = run.pages.min(room);
        let last = pages == run.pages;
        Batch {
            space,
            vaddr: run.vaddr,
            pages,
            flags: run.flags,
            len: usize::try_from(pages * page_bytes).expect("at most one batch or one page"),
            header_follows: if last { self.headers.missing() } else { 0 },
        }
    }
}

/// OPEN and PARENT have no pages: anything there means that the stream slipped.
fn check_bare(header: &Header) -> Result<(), PageServerError> {
    if (header.flags, header.pages, header.vaddr) != (0, 0, 0) {
        return Err(PageServerError::BadHeader);
    }
    Ok(())
}

/// The run of `header`, if it keeps the rules of pagemaps behind a run that ended at `end`.
fn checked_run(
    header: &Header,
    flags: u32,
    end: u64,
    page_size: PageSize,
) -> Result<PageRun, RunProblem> {
    let (vaddr, pages) = (header.vaddr, header.pages);
    let flags = PageFlags::from_bits(flags).ok_or(RunProblem::UnknownFlags(flags))?;
    if flags.is_parent() && flags.is_present() {
        return Err(RunProblem::PresentAndParent);
    }
    if !page_size.is_aligned(vaddr) {
        return Err(RunProblem::Unaligned(page_size.bytes()));
    }
    if pages == 0 {
        return Err(RunProblem::Empty);
    }
    if pages > MAX_PAGES {
        return Err(RunProblem::Absurd(pages));
    }
    page_size
        .checked_bytes(pages)
        .and_then(|bytes| vaddr.checked_add(bytes))
        .ok_or(RunProblem::Overflow(pages))?;
    if vaddr < end {
        return Err(RunProblem::Descending(end));
    }
    Ok(PageRun {
        vaddr,
        pages,
        flags,
    })
}

#[cfg(test)]
mod tests;
