//! The sockets of a streamer: who may reach them, and how descriptors are read from them.

use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, FlockOperation, OFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recv, recvmsg,
};

use super::StreamerError;

/// Longest path of a socket, in bytes: the address has room for 108 with its end.
const MAX_SOCKET_PATH: usize = 107;

/// A directory for sockets that nobody else may enter, ours while this lives.
#[derive(Debug)]
pub(super) struct Place {
    directory: PathBuf,
    _lock: File,
}

impl Place {
    /// Takes `directory`, which is made if it does not exist.
    pub(super) fn take(directory: &Path) -> Result<Self, StreamerError> {
        match fs::DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(StreamerError::io(directory, "create the directory")(error));
            }
            _ => {}
        }
        let lock = File::open(directory).map_err(StreamerError::io(directory, "open"))?;
        let meta = lock
            .metadata()
            .map_err(StreamerError::io(directory, "read the status of"))?;
        let own = meta.uid() == rustix::process::geteuid().as_raw();
        if !meta.is_dir() || !own || meta.mode() & 0o077 != 0 {
            return Err(StreamerError::Public(directory.to_owned()));
        }
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(StreamerError::Busy(directory.to_owned())),
            other => other.map_err(StreamerError::io(directory, "lock"))?,
        }
        Ok(Self {
            directory: directory.to_owned(),
            _lock: lock,
        })
    }

    /// Listens at the socket `name` in it.
    pub(super) fn listen(&self, name: &str) -> Result<Listener, StreamerError> {
        let path = self.directory.join(name);
        if path.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(StreamerError::LongPath(path));
        }
        // What an earlier streamer left: the lock says that it has ended.
        let _ = fs::remove_file(&path);
        let socket = UnixListener::bind(&path).map_err(StreamerError::io(&path, "listen at"))?;
        socket
            .set_nonblocking(true)
            .map_err(StreamerError::io(&path, "set up"))?;
        Ok(Listener { socket, path })
    }
}

/// A listening socket, whose file goes when it does.
#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// A connection, if there is one.
    pub(super) fn accept(&self) -> Result<Option<UnixStream>, StreamerError> {
        let failed = |error| StreamerError::io(&self.path, "accept from")(error);
        match self.socket.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true).map_err(failed)?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // One that stays is removed by the next streamer.
        let _ = fs::remove_file(&self.path);
    }
}

/// Ends a waiting [`Capture`](super::Capture) or [`Serve`](super::Serve) when it is dropped.
#[derive(Debug)]
pub struct Stopper {
    _end: UnixStream,
}

/// The other end of a [`Stopper`]: readable once that is gone.
#[derive(Debug)]
pub(super) struct Stopped(UnixStream);

impl Stopped {
    pub(super) fn new() -> io::Result<(Self, Stopper)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self(ours), Stopper { _end: theirs }))
    }
}

impl AsFd for Stopped {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a read gave.
#[derive(Debug)]
pub(super) enum Read<T> {
    Got(T),
    /// Nothing yet.
    Later,
    /// The peer has closed the socket.
    End,
}

/// Reads at most `buffer.len()` bytes from a socket that does not block.
pub(super) fn read_bytes(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Read<usize>> {
    loop {
        return match recv(&socket, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Ok(Read::End),
            Ok((_, count)) => Ok(Read::Got(count)),
            Err(Errno::INTR) => continue,
            Err(Errno::WOULDBLOCK) => Ok(Read::Later),
            // CRIU died with something of ours unread.
            Err(Errno::CONNRESET) => Ok(Read::End),
            Err(error) => Err(error.into()),
        };
    }
}

/// Reads the one byte that carries a descriptor. `Err` in it: what came instead of one pipe's end
/// that is open for `access`.
pub(super) fn read_pipe(
    socket: impl AsFd,
    access: OFlags,
) -> io::Result<Read<Result<OwnedFd, &'static str>>> {
    // Room for more than one, so that too many are told from a peer that sends none.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        let mut buffers = [io::IoSliceMut::new(&mut byte)];
        match recvmsg(&socket, &mut buffers, &mut control, flags) {
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) => return Ok(Read::Later),
            Err(Errno::CONNRESET) => return Ok(Read::End),
            other => break other?,
        }
    };
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            descriptors.extend(rights);
        }
    }
    if message.bytes == 0 {
        return Ok(Read::End);
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Ok(Read::Got(Err("more than this process may have open")));
    }
    let one = match <[OwnedFd; 1]>::try_from(descriptors) {
        Ok([one]) => one,
        Err(none) if none.is_empty() => return Ok(Read::Got(Err("no descriptor"))),
        Err(_) => return Ok(Read::Got(Err("several descriptors"))),
    };
    Ok(Read::Got(checked(one, access)))
}

fn checked(descriptor: OwnedFd, access: OFlags) -> Result<OwnedFd, &'static str> {
    let unknown = |_: Errno| "something that cannot be examined";
    let stat = rustix::fs::fstat(&descriptor).map_err(unknown)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo {
        return Err("a descriptor of something else");
    }
    let flags = rustix::fs::fcntl_getfl(&descriptor).map_err(unknown)?;
    if flags & OFlags::RWMODE != access {
        return Err("the wrong end of a pipe");
    }
    Ok(descriptor)
}
