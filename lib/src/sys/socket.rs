//! TCP_REPAIR, which rustix does not have.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::{Errno, Result};

/// Whether `socket` is one of TCP's in repair mode, where it neither sends nor hears anything. Fails
/// where it is no socket of TCP's.
pub(crate) fn is_in_tcp_repair(socket: impl AsFd) -> Result<bool> {
    let mut value: libc::c_int = 0;
    let mut length = LENGTH;
    // SAFETY: the kernel writes at most `length` bytes, the size of `value`, to `value`, and the
    // length to `length`; both outlive the call. `socket` is open for as long as it is borrowed.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    checked(result).map(|()| value != 0)
}

/// Ends it, and lets the kernel ask the peer where it is. Afterwards the socket has no SO_REUSEADDR,
/// whatever it had before.
pub(crate) fn end_tcp_repair(socket: impl AsFd) -> Result<()> {
    let off: libc::c_int = 0;
    // SAFETY: the kernel reads `LENGTH` bytes, the size of `off`, which outlives the call. `socket`
    // is open for as long as it is borrowed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw const off).cast(),
            LENGTH,
        )
    };
    checked(result)
}

#[expect(clippy::cast_possible_truncation, reason = "four bytes")]
const LENGTH: libc::socklen_t = size_of::<libc::c_int>() as libc::socklen_t;

fn checked(result: libc::c_int) -> Result<()> {
    if result == 0 {
        return Ok(());
    }
    let number = std::io::Error::last_os_error().raw_os_error();
    Err(Errno::from_raw_os_error(number.unwrap_or(libc::EIO)))
}
