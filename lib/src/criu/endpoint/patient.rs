//! A socket that waits for CRIU, but not for ever.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, recv, recvmsg, sendmsg,
};

use super::now;
use super::uncork::Corked;

/// How long nothing may come before CRIU's socket is uncorked.
const STALL: Duration = Duration::from_millis(1);

/// The same once that was done often to no avail: CRIU is busy elsewhere.
const LONG_STALL: Duration = Duration::from_millis(10);

/// Reads and writes with a limit; never blocks otherwise.
#[derive(Debug)]
pub(super) struct Patient<'a> {
    pub(super) socket: &'a OwnedFd,
    /// CRIU's end, where it can be had.
    pub(super) cork: Option<&'a Corked>,
    /// How long to wait for anything.
    pub(super) limit: Duration,
    /// Whether that is why an operation failed.
    pub(super) gave_up: bool,
}

impl Patient<'_> {
    /// Waits until the socket is ready, or has ended.
    fn wait(&mut self, what: PollFlags) -> io::Result<()> {
        let (begin, mut rounds) = (now(), 0u32);
        loop {
            let left = self.limit.saturating_sub(begin.elapsed());
            let step = match self.cork {
                Some(_) if rounds < 200 => left.min(STALL),
                Some(_) => left.min(LONG_STALL),
                None => left,
            };
            if is_ready(self.socket, what, step)? {
                return Ok(());
            }
            if left.is_zero() {
                self.gave_up = true;
                return Err(io::ErrorKind::TimedOut.into());
            }
            rounds = rounds.saturating_add(1);
            if self.cork.is_some_and(|corked| !corked.uncork()) {
                self.cork = None;
            }
        }
    }

    fn receive(&mut self, places: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        loop {
            // Descriptors that come along are dropped by the kernel.
            let mut nothing = RecvAncillaryBuffer::default();
            match recvmsg(self.socket, places, &mut nothing, RecvFlags::DONTWAIT) {
                Ok(message) => return Ok(message.bytes),
                Err(Errno::AGAIN) => self.wait(PollFlags::IN)?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Whether the peer ends the connection; false if it sends on, or just stays.
    pub(super) fn sees_end(&mut self) -> io::Result<Option<bool>> {
        let mut byte = [0; 1];
        match self.read(&mut byte) {
            Ok(0) => Ok(Some(true)),
            Ok(_) => Ok(Some(false)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Some(true)),
            Err(_) if self.gave_up => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Drops the next bytes if they are there already, and as many zeros as asked for.
    pub(super) fn skip_zeros(&mut self, count: usize) {
        let mut bytes = vec![1; count];
        let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let there = recv(self.socket, &mut bytes, peek).is_ok_and(|(_, there)| there == count);
        if there && bytes.iter().all(|byte| *byte == 0) {
            let _ = recv(self.socket, &mut bytes, RecvFlags::DONTWAIT);
        }
    }
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.receive(&mut [IoSliceMut::new(buffer)])
    }

    fn read_vectored(&mut self, places: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.receive(places)
    }
}

impl Write for Patient<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let mut nothing = SendAncillaryBuffer::default();
            match sendmsg(self.socket, &[IoSlice::new(bytes)], &mut nothing, flags) {
                Ok(count) => return Ok(count),
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn is_ready(socket: &OwnedFd, what: PollFlags, within: Duration) -> io::Result<bool> {
    let limit = Timespec::try_from(within).map_err(|_| io::ErrorKind::InvalidInput)?;
    match poll(
        &mut [PollFd::from_borrowed_fd(socket.as_fd(), what)],
        Some(&limit),
    ) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}
