//! The streamer's side of one `criu restore --stream`.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use super::framing::{Requests, Role, Want};
use super::socket::{self, Listener, Place, Read, Stopped, Stopper};
use super::{StreamerError, enlarge};
use crate::image::{Completeness, FlatFile, FlatView, ImageError, Piece};

const SOCKET: &str = "streamer-serve.sock";

/// Most bytes moved by one call.
const SPLICE_BYTES: u64 = 1 << 20;

/// Most bytes put into one pipe before the others are looked at. A pipe that is full ends the turn
/// before that, except where CRIU reads as fast as we write.
const TURN_BYTES: usize = 16 << 20;

/// Zeros for pages that are in no file.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What a restore took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Images that it was given.
    pub images: u64,
    /// Images that it asked for and that do not exist.
    pub absent: u64,
    /// Bytes that it was given.
    pub bytes: u64,
    /// Images that it did not read to their end, which is no error.
    pub unfinished: u64,
}

/// Gives one restore the images of one set. CRIU can connect while this exists.
#[derive(Debug)]
pub struct Serve {
    directory: PathBuf,
    entrance: Listener,
    stopped: Stopped,
    _place: Place,
}

impl Serve {
    /// Waits for CRIU by the socket in `directory`, which is made if it does not exist.
    pub fn listen(directory: &Path) -> Result<(Self, Stopper), StreamerError> {
        let place = Place::take(directory)?;
        let (stopped, stopper) =
            Stopped::new().map_err(StreamerError::io(directory, "set up sockets for"))?;
        let serve = Self {
            directory: directory.to_owned(),
            entrance: place.listen(SOCKET)?,
            stopped,
            _place: place,
        };
        Ok((serve, stopper))
    }

    /// Whether `set` may be served: only what CRIU can restore.
    pub fn check(set: &FlatView) -> Result<(), StreamerError> {
        match set.chain().completeness() {
            Completeness::Complete => Ok(()),
            other => Err(StreamerError::Incomplete {
                directory: set.chain().newest().path().to_owned(),
                what: other.to_string(),
            }),
        }
    }

    /// Serves one restore from `set`, to its end. That it ended does not mean that it succeeded: CRIU
    /// closes its socket in either case.
    pub fn serve(self, set: &FlatView) -> Result<Served, StreamerError> {
        Self::check(set)?;
        let mut serving = Serving {
            directory: self.directory,
            set,
            entrance: Some(self.entrance),
            stopped: self.stopped,
            criu: None,
            requests: Requests::new(Role::Serve),
            asked: None,
            replies: VecDeque::new(),
            feeds: Vec::new(),
            served: Served::default(),
        };
        serving.run()?;
        Ok(serving.served)
    }
}

struct Serving<'a> {
    directory: PathBuf,
    set: &'a FlatView,
    entrance: Option<Listener>,
    stopped: Stopped,
    criu: Option<UnixStream>,
    requests: Requests,
    /// The image whose pipe is due.
    asked: Option<FlatFile<'a>>,
    /// Bytes that CRIU's socket did not take yet.
    replies: VecDeque<u8>,
    feeds: Vec<Feed<'a>>,
    served: Served,
}

/// An image on its way.
struct Feed<'a> {
    pipe: OwnedFd,
    file: FlatFile<'a>,
    piece: Option<Rest>,
}

/// What is left of a piece.
struct Rest {
    piece: Piece,
    done: u64,
}

/// Why a feed is left for now.
enum Fed {
    Later,
    End,
    /// CRIU does not read further.
    Closed,
}

impl Serving<'_> {
    fn run(&mut self) -> Result<(), StreamerError> {
        loop {
            let ready = self.wait()?;
            self.meet()?;
            self.reply()?;
            self.hear()?;
            self.feed(&ready)?;
            if self.entrance.is_none() && self.criu.is_none() && self.feeds.is_empty() {
                return Ok(());
            }
        }
    }

    // Which feeds can be written to; everything else is tried each time, it is little.
    fn wait(&self) -> Result<Vec<bool>, StreamerError> {
        let mut sockets = vec![PollFd::new(&self.stopped, PollFlags::IN)];
        if let Some(entrance) = &self.entrance {
            sockets.push(PollFd::from_borrowed_fd(entrance.as_fd(), PollFlags::IN));
        }
        if let Some(criu) = &self.criu {
            let events = match self.replies.is_empty() {
                true => PollFlags::IN,
                false => PollFlags::OUT,
            };
            sockets.push(PollFd::from_borrowed_fd(criu.as_fd(), events));
        }
        let first = sockets.len();
        let pipes = self.feeds.iter().map(|feed| feed.pipe.as_fd());
        sockets.extend(pipes.map(|pipe| PollFd::from_borrowed_fd(pipe, PollFlags::OUT)));
        loop {
            match poll(&mut sockets, None) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.failed("wait for CRIU by")(error)),
            }
        }
        if !sockets[0].revents().is_empty() {
            return Err(StreamerError::Stopped);
        }
        let ready = sockets[first..].iter();
        Ok(ready.map(|pipe| !pipe.revents().is_empty()).collect())
    }

    fn meet(&mut self) -> Result<(), StreamerError> {
        if let Some(entrance) = &self.entrance
            && let Some(socket) = entrance.accept()?
        {
            self.criu = Some(socket);
            self.entrance = None;
        }
        Ok(())
    }

    fn reply(&mut self) -> Result<(), StreamerError> {
        while let Some(criu) = self.criu.as_ref().filter(|_| !self.replies.is_empty()) {
            match rustix::io::write(criu, self.replies.make_contiguous()) {
                Ok(count) => drop(self.replies.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::PIPE | Errno::CONNRESET) => self.criu = None,
                Err(error) => return Err(self.failed("answer CRIU by")(error)),
            }
        }
        Ok(())
    }

    // Reads what CRIU has asked. It waits for each reply, so that one that cannot be written ends this.
    fn hear(&mut self) -> Result<(), StreamerError> {
        while let Some(criu) = self.criu.as_ref().filter(|_| self.replies.is_empty()) {
            let failed = StreamerError::io::<std::io::Error>(&self.directory, "read requests by");
            let more = match self.requests.want() {
                Want::Bytes(wanted) => {
                    let mut buffer = vec![0; wanted];
                    let read = socket::read_bytes(criu, &mut buffer).map_err(failed)?;
                    if let Read::Got(count) = read {
                        self.requests.take_bytes(&buffer[..count])?;
                    }
                    matches_end(&read)
                }
                Want::Answer => {
                    self.answer()?;
                    Some(true)
                }
                Want::Pipe => {
                    let read = socket::read_pipe(criu, OFlags::WRONLY).map_err(failed)?;
                    let more = matches_end(&read);
                    if let Read::Got(pipe) = read {
                        self.begin(pipe)?;
                    }
                    more
                }
            };
            match more {
                Some(true) => {}
                Some(false) => return Ok(()),
                None => {
                    self.criu = None;
                    self.requests.check_end()?;
                }
            }
        }
        Ok(())
    }

    fn answer(&mut self) -> Result<(), StreamerError> {
        let name = self.requests.asked().expect("an answer is wanted");
        self.asked = self.set.open(name.as_str())?;
        if self.asked.is_none() {
            self.served.absent += 1;
        }
        self.replies
            .extend(self.requests.answer(self.asked.is_some()));
        self.reply()
    }

    fn begin(&mut self, pipe: Result<OwnedFd, &'static str>) -> Result<(), StreamerError> {
        let name = self.requests.take_pipe();
        let pipe = pipe.map_err(|what| StreamerError::NoPipe {
            name: name.to_string(),
            what,
        })?;
        enlarge(&pipe);
        // CRIU reads at the other end, which this does not concern.
        rustix::fs::fcntl_setfl(&pipe, OFlags::NONBLOCK)
            .map_err(self.failed("set up a pipe of CRIU by"))?;
        self.served.images += 1;
        self.feeds.push(Feed {
            pipe,
            file: self.asked.take().expect("only what exists gets a pipe"),
            piece: None,
        });
        Ok(())
    }

    fn feed(&mut self, ready: &[bool]) -> Result<(), StreamerError> {
        let mut left = Vec::with_capacity(self.feeds.len());
        for (index, mut feed) in std::mem::take(&mut self.feeds).into_iter().enumerate() {
            // Those that came meanwhile have room.
            if !ready.get(index).copied().unwrap_or(true) {
                left.push(feed);
                continue;
            }
            match feed.pump(&mut self.served.bytes)? {
                Fed::Later => left.push(feed),
                Fed::End => {}
                Fed::Closed => self.served.unfinished += 1,
            }
        }
        self.feeds = left;
        Ok(())
    }

    fn failed<E: Into<std::io::Error>>(
        &self,
        action: &'static str,
    ) -> impl FnOnce(E) -> StreamerError + use<E> {
        StreamerError::io(&self.directory, action)
    }
}

// Some(true): there may be more; Some(false): not yet; None: the end.
fn matches_end<T>(read: &Read<T>) -> Option<bool> {
    match read {
        Read::Got(_) => Some(true),
        Read::Later => Some(false),
        Read::End => None,
    }
}

impl Feed<'_> {
    fn pump(&mut self, bytes: &mut u64) -> Result<Fed, StreamerError> {
        let mut turn = 0;
        while turn < TURN_BYTES {
            if self.piece.is_none() {
                match self.file.next_piece()? {
                    Some(piece) => self.piece = Some(Rest { piece, done: 0 }),
                    None => return Ok(Fed::End),
                }
            }
            let rest = self.piece.as_mut().expect("there is one now");
            if rest.is_empty() {
                self.piece = None;
                continue;
            }
            match rest.write(&self.pipe) {
                Ok(0) => return Err(rest.cut_short().into()),
                Ok(count) => {
                    rest.done += count as u64;
                    *bytes += count as u64;
                    turn += count;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Fed::Later),
                Err(Errno::PIPE) => return Ok(Fed::Closed),
                Err(error) => return Err(rest.failed(error).into()),
            }
        }
        Ok(Fed::Later)
    }
}

impl Rest {
    fn length(&self) -> u64 {
        match &self.piece {
            Piece::Bytes(bytes) => bytes.len() as u64,
            Piece::File { length, .. } | Piece::Zeros(length) => *length,
        }
    }

    fn is_empty(&self) -> bool {
        self.done >= self.length()
    }

    fn write(&self, pipe: &OwnedFd) -> Result<usize, Errno> {
        let left = self.length() - self.done;
        let at_once = usize::try_from(left.min(SPLICE_BYTES)).expect("is small");
        match &self.piece {
            Piece::Bytes(bytes) => {
                let start = bytes.len() - usize::try_from(left).expect("part of a length");
                rustix::io::write(pipe, &bytes[start..])
            }
            Piece::Zeros(_) => rustix::io::write(pipe, &ZEROS[..at_once.min(ZEROS.len())]),
            Piece::File { file, offset, .. } => {
                // Pages go from the page cache into the pipe without a copy: nobody writes to a set.
                let mut from = offset + self.done;
                let flags = SpliceFlags::NONBLOCK;
                splice(file, Some(&mut from), pipe, None, at_once, flags)
            }
        }
    }

    fn cut_short(&self) -> ImageError {
        match &self.piece {
            Piece::File { path, .. } => ImageError::Changed(path.clone()),
            Piece::Bytes(_) | Piece::Zeros(_) => unreachable!("a write is never empty"),
        }
    }

    fn failed(&self, error: Errno) -> ImageError {
        let path = match &self.piece {
            Piece::File { path, .. } => path.as_path(),
            Piece::Bytes(_) | Piece::Zeros(_) => Path::new("a pipe of CRIU"),
        };
        ImageError::io(path, "hand to CRIU")(error)
    }
}
