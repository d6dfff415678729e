//! Between a capture and the action script of the dump that it takes.
//!
//! ```text
//!   criu, pre-stream:  announce ──▶ capture   ◀── ok: now CRIU's socket is there
//!   criu, post-dump:   vote ──────▶ capture   ◀── go, or refuse: why; until then CRIU waits, frozen
//! ```
//!
//! Words are lines. A connection that ends without an answer is a refusal: a capture that dies at
//! any moment lets the tree run on. A dump that was not announced finds no socket, and fails before
//! it touches the tree: so nobody forgets the script and loses a workload by it.

use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::StreamerError;
use super::socket::{self, Read};

/// Name of the capture's socket for votes, in the directory of CRIU's.
pub(super) const SOCKET: &str = "crxfer-vote.sock";

/// Longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 4096;

/// How long an announcement may take: the capture has nothing else to do then.
const ANNOUNCE_LIMIT: Duration = Duration::from_secs(10);

/// How long a verdict may take to be written: the socket is empty.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

const ANNOUNCE: &str = "announce";
const VOTE: &str = "vote";
const OK: &str = "ok";
const GO: &str = "go";

/// What an action script may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    Announce,
    Vote,
}

/// A connection of an action script that has not said its word yet.
#[derive(Debug)]
pub(super) struct Voter {
    socket: UnixStream,
    line: Vec<u8>,
}

impl Voter {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            line: Vec::new(),
        }
    }

    /// Its word, once there is one; `End` for one that says nothing, or something else.
    pub(super) fn read(&mut self) -> Read<Word> {
        let mut byte = [0];
        loop {
            match socket::read_bytes(&self.socket, &mut byte) {
                Ok(Read::Got(_)) if byte[0] == b'\n' => break,
                Ok(Read::Got(_)) if self.line.len() < ANNOUNCE.len() => self.line.push(byte[0]),
                Ok(Read::Later) => return Read::Later,
                Ok(_) | Err(_) => return Read::End,
            }
        }
        match self.line.as_slice() {
            line if line == ANNOUNCE.as_bytes() => Read::Got(Word::Announce),
            line if line == VOTE.as_bytes() => Read::Got(Word::Vote),
            _ => Read::End,
        }
    }

    pub(super) fn confirm(self) -> std::io::Result<()> {
        say(&self.socket, OK)
    }

    pub(super) fn into_vote(self) -> Vote {
        Vote {
            socket: self.socket,
        }
    }
}

impl AsFd for Voter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A dump that is held at post-dump: everything is dumped, the tree is frozen, and CRIU waits.
///
/// Dropping it refuses.
#[derive(Debug)]
pub struct Vote {
    socket: UnixStream,
}

impl Vote {
    /// Whether CRIU still waits. It does not when it, or its script, was killed: the tree then runs.
    pub fn is_awaited(&self) -> bool {
        // A script says nothing after its word, so whatever can be read is its end.
        matches!(socket::read_bytes(&self.socket, &mut [0]), Ok(Read::Later))
    }

    /// CRIU goes on: it kills the tree, or leaves it running if it was told so.
    pub fn go_on(self) -> Result<(), StreamerError> {
        if !self.is_awaited() {
            return Err(StreamerError::NoVote);
        }
        say(&self.socket, GO).map_err(|_| StreamerError::NoVote)
    }

    /// CRIU fails its dump, and the tree runs on.
    pub fn refuse(self, why: &str) {
        // Without it the end of the connection says the same, in no words.
        let _ = say(&self.socket, &format!("refuse: {}", why.replace('\n', " ")));
    }
}

fn say(mut socket: &UnixStream, word: &str) -> std::io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_write_timeout(Some(WRITE_LIMIT))?;
    socket.write_all(format!("{word}\n").as_bytes())
}

/// The action script's side of pre-stream: tells the capture by `directory` that a vote will be asked
/// for. Returns when CRIU can connect.
pub fn announce(directory: &Path) -> Result<(), StreamerError> {
    let answer = ask(directory, ANNOUNCE, Some(ANNOUNCE_LIMIT))?;
    match answer.as_str() {
        OK => Ok(()),
        other => Err(refused(other)),
    }
}

/// The action script's side of post-dump. Blocks until the capture by `directory` lets CRIU go on, or
/// refuses; any error is a refusal.
pub fn vote(directory: &Path) -> Result<(), StreamerError> {
    let answer = ask(directory, VOTE, None)?;
    match answer.as_str() {
        GO => Ok(()),
        other => Err(refused(other)),
    }
}

fn refused(answer: &str) -> StreamerError {
    match answer.strip_prefix("refuse: ") {
        Some(why) => StreamerError::Refused(why.to_owned()),
        None => StreamerError::NoVerdict,
    }
}

fn ask(directory: &Path, word: &str, limit: Option<Duration>) -> Result<String, StreamerError> {
    let path: PathBuf = directory.join(SOCKET);
    let socket =
        UnixStream::connect(&path).map_err(|_| StreamerError::NoCapture(directory.to_owned()))?;
    socket
        .set_read_timeout(limit)
        .map_err(StreamerError::io(&path, "set up"))?;
    (&socket)
        .write_all(format!("{word}\n").as_bytes())
        .map_err(|_| StreamerError::NoVerdict)?;
    let mut answer = String::new();
    BufReader::new(socket.take(MAX_ANSWER))
        .read_line(&mut answer)
        .map_err(|_| StreamerError::NoVerdict)?;
    match answer.strip_suffix('\n') {
        Some(line) => Ok(line.to_owned()),
        None => Err(StreamerError::NoVerdict),
    }
}
