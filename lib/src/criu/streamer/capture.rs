//! The streamer's side of one `criu dump --stream`.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use super::framing::{Requests, Role, Want};
use super::socket::{self, Listener, Place, Read, Stopped, Stopper};
use super::vote::{self, Vote, Voter, Word};
use super::{StreamerError, enlarge};
use crate::delta::FileName;

const SOCKET: &str = "streamer-capture.sock";

/// How long CRIU may take from its pre-stream script to its connection: it does nothing between.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Most bytes taken from one pipe before the others are looked at.
const TURN_BYTES: usize = 16 << 20;

/// Most bytes moved by one call.
const SPLICE_BYTES: usize = 1 << 20;

/// How a dump is taken.
#[derive(Clone, Copy, Debug)]
pub struct CaptureOptions {
    /// Whether CRIU is held at post-dump by an action script that calls [`vote::announce`] and
    /// [`vote::vote`]. Without, the tree is killed before anybody knows what becomes of its images.
    pub hold: bool,
    /// How long CRIU may be silent during its dump.
    pub silence: Duration,
}

impl Default for CaptureOptions {
    /// Held; 120 s: what iptables takes to lock some thousand connections, during which CRIU is silent.
    fn default() -> Self {
        Self {
            hold: true,
            silence: Duration::from_secs(120),
        }
    }
}

/// All images of a dump are taken.
#[derive(Debug)]
pub struct Captured {
    /// How many there are.
    pub images: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What CRIU waits for; `None` where it is not held.
    pub vote: Option<Vote>,
}

/// Takes one dump. CRIU can connect while this exists.
///
/// Dropped early, it makes CRIU's dump fail, and the tree run on.
#[derive(Debug)]
pub struct Capture {
    options: CaptureOptions,
    directory: PathBuf,
    place: Place,
    stopped: Stopped,
    /// Where images go.
    images: OwnedFd,
    votes: Option<Listener>,
    voters: Vec<Voter>,
    /// Where CRIU connects, until it has.
    entrance: Option<Listener>,
    criu: Option<Dialogue>,
    /// Whether CRIU has closed its socket.
    ended: bool,
    streams: Vec<Stream>,
    vote: Option<Vote>,
    taken: u64,
    bytes: u64,
}

/// CRIU's connection.
#[derive(Debug)]
struct Dialogue {
    socket: UnixStream,
    requests: Requests,
}

/// An image on its way.
#[derive(Debug)]
struct Stream {
    name: FileName,
    pipe: OwnedFd,
    file: File,
}

/// Why a stream is left for now.
enum Drained {
    Later,
    End,
}

impl Capture {
    /// Waits by the sockets in `directory`, which is made if it does not exist, for a CRIU whose
    /// images go to `images`, an open and empty directory.
    pub fn listen(
        directory: &Path,
        images: OwnedFd,
        options: CaptureOptions,
    ) -> Result<(Self, Stopper), StreamerError> {
        let place = Place::take(directory)?;
        let (stopped, stopper) =
            Stopped::new().map_err(StreamerError::io(directory, "set up sockets for"))?;
        let (votes, entrance) = match options.hold {
            true => (Some(place.listen(vote::SOCKET)?), None),
            false => (None, Some(place.listen(SOCKET)?)),
        };
        let capture = Self {
            options,
            directory: directory.to_owned(),
            place,
            stopped,
            images,
            votes,
            voters: Vec::new(),
            entrance,
            criu: None,
            ended: false,
            streams: Vec::new(),
            vote: None,
            taken: 0,
            bytes: 0,
        };
        Ok((capture, stopper))
    }

    /// Returns when all images are there and CRIU is held at post-dump, or has ended if it is not held.
    pub fn take(mut self) -> Result<Captured, StreamerError> {
        loop {
            let ready = self.wait()?;
            // Scripts first: at a vote, all that CRIU sent before it can be read.
            self.hear_scripts()?;
            self.meet_criu()?;
            self.hear_criu()?;
            self.drain(&ready)?;
            if self.is_done()? {
                return Ok(Captured {
                    images: self.taken,
                    bytes: self.bytes,
                    vote: self.vote,
                });
            }
        }
    }

    fn is_done(&self) -> Result<bool, StreamerError> {
        if self.ended && self.vote.is_none() && self.options.hold {
            return Err(StreamerError::NoVote);
        }
        if !self.streams.is_empty() || !(self.ended || self.vote.is_some()) {
            return Ok(false);
        }
        if let Some(criu) = &self.criu {
            criu.requests.check_end()?;
        }
        Ok(true)
    }

    // Which streams can be read; everything else is tried each time, it is little.
    fn wait(&self) -> Result<Vec<bool>, StreamerError> {
        let mut sockets: Vec<PollFd<'_>> = Vec::new();
        let mut watch = |socket| sockets.push(PollFd::from_borrowed_fd(socket, PollFlags::IN));
        watch(self.stopped.as_fd());
        self.votes.iter().for_each(|socket| watch(socket.as_fd()));
        self.entrance
            .iter()
            .for_each(|socket| watch(socket.as_fd()));
        self.voters.iter().for_each(|voter| watch(voter.as_fd()));
        if let Some(criu) = self.criu.as_ref().filter(|_| !self.ended) {
            watch(criu.socket.as_fd());
        }
        self.streams.iter().for_each(|one| watch(one.pipe.as_fd()));
        let limit = self.limit();
        let timeout = limit.map(|limit| Timespec::try_from(limit).expect("minutes"));
        loop {
            match poll(&mut sockets, timeout.as_ref()) {
                Ok(0) => return Err(self.silent(limit.unwrap_or_default())),
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.failed("wait for CRIU by")(error)),
            }
        }
        if !sockets[0].revents().is_empty() {
            return Err(StreamerError::Stopped);
        }
        let first = sockets.len() - self.streams.len();
        let ready = sockets[first..].iter();
        Ok(ready.map(|socket| !socket.revents().is_empty()).collect())
    }

    fn limit(&self) -> Option<Duration> {
        match (&self.criu, &self.entrance) {
            (Some(_), _) => Some(self.options.silence),
            (None, Some(_)) if self.options.hold => Some(CONNECT_LIMIT),
            _ => None,
        }
    }

    fn silent(&self, limit: Duration) -> StreamerError {
        match self.criu {
            Some(_) => StreamerError::Silent(limit),
            None => StreamerError::NotConnected(limit),
        }
    }

    fn hear_scripts(&mut self) -> Result<(), StreamerError> {
        let Some(votes) = &self.votes else {
            return Ok(());
        };
        while let Some(socket) = votes.accept()? {
            self.voters.push(Voter::new(socket));
        }
        for mut voter in std::mem::take(&mut self.voters) {
            match voter.read() {
                Read::Later => self.voters.push(voter),
                Read::End => {}
                Read::Got(Word::Announce) => self.admit(voter)?,
                Read::Got(Word::Vote) => {
                    // Its CRIU has connected before, and may not have been looked at yet.
                    self.meet_criu()?;
                    if self.vote.is_some() || self.criu.is_none() {
                        voter.into_vote().refuse("no dump is taken here");
                    } else {
                        self.vote = Some(voter.into_vote());
                    }
                }
            }
        }
        Ok(())
    }

    // A dump is announced: makes its socket.
    fn admit(&mut self, voter: Voter) -> Result<(), StreamerError> {
        if self.criu.is_some() || self.entrance.is_some() {
            voter.into_vote().refuse("another dump is taken here");
            return Ok(());
        }
        self.entrance = Some(self.place.listen(SOCKET)?);
        // A script that is gone took its CRIU with it; then nobody connects.
        let _ = voter.confirm();
        Ok(())
    }

    fn meet_criu(&mut self) -> Result<(), StreamerError> {
        let Some(entrance) = &self.entrance else {
            return Ok(());
        };
        if let Some(socket) = entrance.accept()? {
            self.criu = Some(Dialogue {
                socket,
                requests: Requests::new(Role::Capture),
            });
            self.entrance = None;
        }
        Ok(())
    }

    // Reads all that CRIU has said.
    fn hear_criu(&mut self) -> Result<(), StreamerError> {
        while let Some(criu) = self.criu.as_mut().filter(|_| !self.ended) {
            let heard = match criu.requests.want() {
                Want::Bytes(wanted) => {
                    let mut buffer = vec![0; wanted];
                    match socket::read_bytes(&criu.socket, &mut buffer) {
                        Ok(Read::Got(count)) => {
                            criu.requests.take_bytes(&buffer[..count])?;
                            Ok(Read::Got(None))
                        }
                        Ok(Read::Later) => Ok(Read::Later),
                        Ok(Read::End) => Ok(Read::End),
                        Err(error) => Err(error),
                    }
                }
                Want::Pipe => match socket::read_pipe(&criu.socket, OFlags::RDONLY) {
                    Ok(Read::Got(pipe)) => Ok(Read::Got(Some(pipe))),
                    Ok(Read::Later) => Ok(Read::Later),
                    Ok(Read::End) => Ok(Read::End),
                    Err(error) => Err(error),
                },
                Want::Answer => unreachable!("a dump is not answered"),
            };
            match heard.map_err(self.failed("read CRIU's requests by"))? {
                Read::Got(None) => {}
                Read::Got(Some(pipe)) => self.begin(pipe)?,
                Read::Later => return Ok(()),
                Read::End => {
                    self.ended = true;
                    let criu = self.criu.as_ref().expect("it has just ended");
                    criu.requests.check_end()?;
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, pipe: Result<OwnedFd, &'static str>) -> Result<(), StreamerError> {
        let criu = self.criu.as_mut().expect("it has just sent a pipe");
        let name = criu.requests.take_pipe();
        let pipe = pipe.map_err(|what| StreamerError::NoPipe {
            name: name.to_string(),
            what,
        })?;
        enlarge(&pipe);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.images, name.as_str(), flags, Mode::from(0o600));
        let file = match file {
            Ok(file) => file.into(),
            Err(Errno::NOSPC) => return Err(self.full(&name)),
            Err(error) => {
                return Err(StreamerError::io(name.as_str().as_ref(), "create")(error));
            }
        };
        self.taken += 1;
        self.streams.push(Stream { name, pipe, file });
        Ok(())
    }

    fn drain(&mut self, ready: &[bool]) -> Result<(), StreamerError> {
        let mut left = Vec::with_capacity(self.streams.len());
        for (index, stream) in std::mem::take(&mut self.streams).into_iter().enumerate() {
            // Those that came meanwhile may have something, too.
            let try_it = ready.get(index).copied().unwrap_or(true);
            if try_it && matches!(self.drain_one(&stream)?, Drained::End) {
                continue;
            }
            left.push(stream);
        }
        self.streams = left;
        Ok(())
    }

    fn drain_one(&mut self, stream: &Stream) -> Result<Drained, StreamerError> {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        let mut turn = 0;
        while turn < TURN_BYTES {
            match splice(&stream.pipe, None, &stream.file, None, SPLICE_BYTES, flags) {
                Ok(0) => return Ok(Drained::End),
                Ok(count) => {
                    turn += count;
                    self.bytes += count as u64;
                }
                Err(Errno::AGAIN) => return Ok(Drained::Later),
                Err(Errno::INTR) => {}
                Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => {
                    return Err(self.full(&stream.name));
                }
                Err(error) => {
                    let name = stream.name.as_str().as_ref();
                    return Err(StreamerError::io(name, "write")(error));
                }
            }
        }
        Ok(Drained::Later)
    }

    fn full(&self, name: &FileName) -> StreamerError {
        StreamerError::Full {
            name: name.to_string(),
            taken: self.bytes,
        }
    }

    fn failed<E: Into<std::io::Error>>(
        &self,
        action: &'static str,
    ) -> impl FnOnce(E) -> StreamerError + use<E> {
        StreamerError::io(&self.directory, action)
    }
}
