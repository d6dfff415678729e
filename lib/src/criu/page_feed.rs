//! The other way round: the pages of a set to a real `criu page-server`.
//!
//! ```text
//!   set and its parents ── resolve ──▶ OPEN2, ADD_F + pages, …, CLOSE ──▶ criu page-server -D DIR
//! ```
//!
//! The server gets all pages, whatever the layout of the set: what it writes needs no parent. It does not
//! get the other images; copied beside the pages they make DIR one that CRIU restores.
//!
//! CRIU's server says nothing about its version, and waits for ever for the rest of a header that is
//! shorter than its own. [`HeaderLayout`] can be given; if not, it is found: the first message is sent in
//! the short layout, and completed to one of the long layout if no answer comes.

use std::io::{self, Read, Write};
use std::time::Duration;

use super::page_server::HeaderLayout;
use crate::image::{Chain, ImageError, PageFlags, PagemapName, PagesReader, ResolvedRun, Source};

/// How long a server may take for the answer to the first message before its layout is taken for the
/// longer one. It answers at once; this is for the way.
const FIRST_ANSWER: Duration = Duration::from_secs(1);

/// A socket that does not wait for ever.
pub trait FeedSocket: Read + Write {
    /// From now on reads and writes fail with `WouldBlock` or `TimedOut` after `limit`.
    fn limit(&self, limit: Duration) -> io::Result<()>;
}

impl FeedSocket for std::net::TcpStream {
    fn limit(&self, limit: Duration) -> io::Result<()> {
        self.set_write_timeout(Some(limit))?;
        self.set_read_timeout(Some(limit))
    }
}

impl FeedSocket for std::os::unix::net::UnixStream {
    fn limit(&self, limit: Duration) -> io::Result<()> {
        self.set_write_timeout(Some(limit))?;
        self.set_read_timeout(Some(limit))
    }
}

/// What a server took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fed {
    /// Its layout of headers.
    pub layout: HeaderLayout,
    /// Tasks and shared segments.
    pub spaces: u64,
    /// Pages.
    pub pages: u64,
    /// Bytes of them.
    pub bytes: u64,
}

/// Why a server did not take a set.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// The set.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The socket.
    #[error("criu page-server: cannot {action} ({source})")]
    Io {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// It has closed the connection.
    #[error(
        "criu page-server ended the connection at {at}; its log says why. Up to CRIU 4.1 and since 4.2 \
         they understand different headers: --criu-version chooses"
    )]
    Ended {
        /// Where.
        at: Place,
    },
    /// It says nothing.
    #[error(
        "criu page-server did not answer within {} s at {at}. Up to CRIU 4.1 and since 4.2 they \
         understand different headers: --criu-version chooses",
        .limit.as_secs_f32()
    )]
    Silent {
        /// Where.
        at: Place,
        /// How long it had.
        limit: Duration,
    },
    /// Not what a page server answers.
    #[error("what answers is no criu page-server: {0} where 0 or 1 should be")]
    NoServer(u8),
    /// Its answer to CLOSE.
    #[error("criu page-server did not take the pages (status {0}); its log says why")]
    Refused(i32),
    /// Nothing to send.
    #[error("the set has no memory")]
    Nothing,
}

/// A place in the dialogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The begin of a task or segment.
    Open(PagemapName),
    /// The pages of one.
    Pages(PagemapName),
    /// The end.
    Close,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Open(space) => write!(f, "the begin of {space}"),
            Self::Pages(space) => write!(f, "the pages of {space}"),
            Self::Close => write!(f, "the end"),
        }
    }
}

const OPEN2: u32 = 4;
const ADD_F: u32 = 6;
const CLOSE: u32 = 0x1023;

/// Sends all pages of the newest directory of `chain` to the server at the other end of `socket`, and waits
/// until it has them. `limit` is for each of its answers; `progress` is told of bytes, run by run.
///
/// That the server has them does not mean that its disk has: it syncs nothing.
pub fn feed(
    chain: &Chain,
    socket: &mut impl FeedSocket,
    layout: Option<HeaderLayout>,
    limit: Duration,
    mut progress: impl FnMut(u64),
) -> Result<Fed, FeedError> {
    chain.require_understood()?;
    let mut feeder = Feeder {
        socket,
        layout,
        limit,
        page_bytes: chain.page_size().bytes(),
        fed: Fed {
            layout: HeaderLayout::New,
            spaces: 0,
            pages: 0,
            bytes: 0,
        },
    };
    let mut reader = PagesReader::new(chain);
    // Nothing is sent of a set that is not whole.
    let memories = chain.newest().pagemaps().keys();
    let memories: Vec<_> = memories
        .map(|space| Ok((*space, checked(*space, chain.resolve(*space)?)?)))
        .collect::<Result<_, ImageError>>()?;
    if memories.is_empty() {
        return Err(FeedError::Nothing);
    }
    for (space, runs) in &memories {
        feeder.open(*space)?;
        for run in runs {
            feeder.run(*space, run, &mut reader, &mut progress)?;
        }
    }
    feeder.close()
}

/// Pages that a lazy dump left at its source cannot be sent.
fn checked(space: PagemapName, runs: Vec<ResolvedRun>) -> Result<Vec<ResolvedRun>, ImageError> {
    match runs.iter().find(|run| run.source == Source::Lazy) {
        None => Ok(runs),
        Some(lazy) => Err(ImageError::LazyPages {
            file: space.to_string(),
            vaddr: lazy.vaddr,
            pages: lazy.pages,
        }),
    }
}

struct Feeder<'a, T> {
    socket: &'a mut T,
    layout: Option<HeaderLayout>,
    limit: Duration,
    page_bytes: u64,
    fed: Fed,
}

impl<T: FeedSocket> Feeder<'_, T> {
    fn open(&mut self, space: PagemapName) -> Result<(), FeedError> {
        let at = Place::Open(space);
        let answer = match self.layout {
            Some(layout) => {
                self.send(&header(layout, OPEN2, 0, 0, id_of(space)), at)?;
                self.answer::<1>(at, self.limit)?
            }
            None => self.open_unknown(space)?,
        };
        self.fed.spaces += 1;
        // Whether it has a parent does not matter: it gets everything.
        match answer {
            [0 | 1] => Ok(()),
            [other] => Err(FeedError::NoServer(other)),
        }
    }

    /// Opens `space` in whichever layout the server has. Where it is the long one, the 24 bytes of the short
    /// one are its first, with the id where it has an address that OPEN2 does not use.
    fn open_unknown(&mut self, space: PagemapName) -> Result<[u8; 1], FeedError> {
        let (at, id) = (Place::Open(space), id_of(space));
        self.send(&header(HeaderLayout::Old, OPEN2, 0, 0, id), at)?;
        match self.answer::<1>(at, self.limit.min(FIRST_ANSWER)) {
            Ok(answer) => {
                self.layout = Some(HeaderLayout::Old);
                Ok(answer)
            }
            Err(FeedError::Silent { .. }) => {
                self.layout = Some(HeaderLayout::New);
                self.send(&id.to_ne_bytes(), at)?;
                self.answer::<1>(at, self.limit)
            }
            Err(error) => Err(error),
        }
    }

    fn run(
        &mut self,
        space: PagemapName,
        run: &ResolvedRun,
        reader: &mut PagesReader<'_>,
        progress: &mut impl FnMut(u64),
    ) -> Result<(), FeedError> {
        let at = Place::Pages(space);
        let layout = self.layout.unwrap_or(HeaderLayout::New);
        // What comes from a parent has lost what CRIU knew about its lazy restore.
        let flags = if run.flags_at_top.is_present() {
            run.flags_at_top
        } else {
            PageFlags::PRESENT
        };
        let page_bytes = self.page_bytes;
        reader.for_each_piece(space, run, |vaddr, bytes| {
            let pages = bytes.len() as u64 / page_bytes;
            let command = ADD_F | flags.bits() << 16;
            self.send(&header(layout, command, pages, vaddr, id_of(space)), at)?;
            self.send(bytes, at)?;
            self.fed.pages += pages;
            self.fed.bytes += bytes.len() as u64;
            progress(bytes.len() as u64);
            Ok(())
        })
    }

    fn close(mut self) -> Result<Fed, FeedError> {
        let layout = self.layout.unwrap_or(HeaderLayout::New);
        self.send(&header(layout, CLOSE, 0, 0, 0), Place::Close)?;
        let status = i32::from_ne_bytes(self.answer(Place::Close, self.limit)?);
        if status != 0 {
            return Err(FeedError::Refused(status));
        }
        self.fed.layout = layout;
        Ok(self.fed)
    }

    fn send(&mut self, bytes: &[u8], at: Place) -> Result<(), FeedError> {
        self.socket
            .write_all(bytes)
            .map_err(|source| failed(source, "send", at, self.limit))
    }

    fn answer<const N: usize>(&mut self, at: Place, limit: Duration) -> Result<[u8; N], FeedError> {
        let mut answer = [0; N];
        self.socket
            .limit(limit)
            .and_then(|()| self.socket.read_exact(&mut answer))
            .map_err(|source| failed(source, "read its answer", at, limit))?;
        Ok(answer)
    }
}

fn failed(source: io::Error, action: &'static str, at: Place, limit: Duration) -> FeedError {
    use io::ErrorKind as Kind;
    match source.kind() {
        Kind::UnexpectedEof | Kind::ConnectionReset | Kind::BrokenPipe => FeedError::Ended { at },
        Kind::WouldBlock | Kind::TimedOut => FeedError::Silent { at, limit },
        _ => FeedError::Io { action, source },
    }
}

/// How the protocol names a task or segment.
fn id_of(space: PagemapName) -> u64 {
    match space {
        PagemapName::Task(id) => id << 8 | 1,
        PagemapName::Shmem(id) => id << 8 | 2,
    }
}

/// A header, as it lies in the server's memory.
fn header(layout: HeaderLayout, command: u32, pages: u64, vaddr: u64, id: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(layout.byte_len());
    bytes.extend(command.to_ne_bytes());
    match layout {
        HeaderLayout::Old => {
            let pages = u32::try_from(pages).expect("at most 1 MiB of pages");
            bytes.extend(pages.to_ne_bytes());
        }
        HeaderLayout::New => {
            bytes.extend([0; 4]);
            bytes.extend(pages.to_ne_bytes());
        }
    }
    bytes.extend(vaddr.to_ne_bytes());
    bytes.extend(id.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests;
