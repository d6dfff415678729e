//! The line between a guard and the program beside which it waits.
//!
//! Its end is the news that the program is gone. Until then the program may give the guard what must
//! outlive it and has no name: the private memory of a migration, by a descriptor.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg,
    socketpair,
    sockopt::{Timeout, set_socket_timeout},
};

use crate::wire::MigrationId;

/// How long a guard may take to say that it holds something.
const ANSWER_TIME: Duration = Duration::from_secs(2);

const DISMISS: u8 = b'.';
const HOLD: u8 = b'h';
const RELEASE: u8 = b'r';

/// A kind and an id.
const LENGTH: usize = 17;

/// The program's end.
#[derive(Debug)]
pub(super) struct Line(OwnedFd);

/// What a guard holds for migrations.
pub(super) type Held = HashMap<MigrationId, OwnedFd>;

/// Why a guard stops waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The program is gone.
    Gone,
    /// Nothing is left to do.
    Dismissed,
}

/// A line, and the end that is to be the guard's standard input.
pub(super) fn pair() -> io::Result<(Line, OwnedFd)> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        // Each message by itself, and an end where the other one is closed.
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    for direction in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&ours, direction, Some(ANSWER_TIME))?;
    }
    Ok((Line(ours), theirs))
}

impl Line {
    /// Says that nothing is left to do.
    pub(super) fn dismiss(&self) -> io::Result<()> {
        self.say(
            DISMISS,
            MigrationId([0; 16]),
            &mut SendAncillaryBuffer::default(),
        )
    }

    /// Has the guard hold `what`; gives its number for it. Blocks for a moment; fails where the guard is
    /// gone or hangs.
    pub(super) fn hold(&self, id: MigrationId, what: BorrowedFd<'_>) -> io::Result<RawFd> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut with = SendAncillaryBuffer::new(&mut space);
        let given = [what];
        let fits = with.push(SendAncillaryMessage::ScmRights(&given));
        debug_assert!(fits, "there is space for one");
        self.say(HOLD, id, &mut with)?;
        let mut number = [0; size_of::<RawFd>()];
        match recv(&self.0, &mut number, RecvFlags::empty())? {
            (_, 4) => Ok(RawFd::from_le_bytes(number)),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Has it let go of what it holds for that migration.
    pub(super) fn release(&self, id: MigrationId) -> io::Result<()> {
        self.say(RELEASE, id, &mut SendAncillaryBuffer::default())
    }

    fn say(
        &self,
        kind: u8,
        id: MigrationId,
        with: &mut SendAncillaryBuffer<'_, '_, '_>,
    ) -> io::Result<()> {
        let mut message = [kind; LENGTH];
        message[1..].copy_from_slice(&id.0);
        sendmsg(
            &self.0,
            &[IoSlice::new(&message)],
            with,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }
}

/// Waits for the line's end, taking what is given to `held` meanwhile.
pub(super) fn wait(line: impl AsFd, held: &mut Held) -> End {
    let line = line.as_fd();
    loop {
        let mut message = [0; LENGTH];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut with = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut message)];
        match recvmsg(line, &mut parts, &mut with, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => continue,
            Err(_) => return End::Gone,
            Ok(read) if read.bytes == 0 => return End::Gone,
            Ok(_) => {}
        }
        let given = with.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut given) => given.next(),
            _ => None,
        });
        let mut id = MigrationId([0; 16]);
        id.0.copy_from_slice(&message[1..]);
        match (message[0], given) {
            (DISMISS, _) => return End::Dismissed,
            (HOLD, Some(given)) => {
                let number = given.as_raw_fd().to_le_bytes();
                held.insert(id, given);
                // Where nobody hears it, the line's end comes next.
                let _ = send(line, &number, SendFlags::NOSIGNAL);
            }
            (RELEASE, _) => drop(held.remove(&id)),
            // Of a newer program.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read as _;

    use super::*;

    #[test]
    fn what_was_given_is_held_until_it_is_released() {
        let (line, theirs) = pair().expect("a line");
        let guard = std::thread::spawn(move || {
            let mut held = Held::new();
            let end = wait(&theirs, &mut held);
            (end, held)
        });
        let (one, two) = (MigrationId([1; 16]), MigrationId([2; 16]));
        let (mut reads, writes) = io::pipe().expect("a pipe");
        let (_kept, other) = io::pipe().expect("a pipe");
        let number = line.hold(one, writes.as_fd()).expect("held");
        // Tests share a process: the number is one of ours.
        assert!(File::open(format!("/proc/self/fd/{number}")).is_err() || number > 2);
        line.hold(two, other.as_fd()).expect("held");
        drop(writes);
        line.release(one).expect("said");
        // Nobody writes to it any more.
        assert_eq!(reads.read(&mut [0]).expect("the end"), 0);
        drop(line);
        let (end, held) = guard.join().expect("ended");
        assert_eq!(end, End::Gone);
        assert_eq!(held.keys().collect::<Vec<_>>(), [&two]);
    }

    #[test]
    fn word_ends_the_wait_and_silence_is_an_error() {
        let (line, theirs) = pair().expect("a line");
        line.dismiss().expect("said");
        assert_eq!(wait(&theirs, &mut Held::new()), End::Dismissed);
        drop(theirs);
        assert!(line.hold(MigrationId([1; 16]), line.0.as_fd()).is_err());
    }
}
