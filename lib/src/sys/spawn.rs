//! Child processes that get descriptors of ours, or a session of their own.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::{FdFlags, fcntl_setfd};

/// Lets the child of `command` have `descriptors`, under the numbers that they have here.
///
/// They stay close-on-exec in this process, so no other child that another thread starts in the
/// meantime gets them. `command` owns them: they are closed here when it is dropped.
pub(crate) fn pass_descriptors(command: &mut Command, descriptors: Vec<OwnedFd>) {
    let clear = move || {
        for descriptor in &descriptors {
            fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure may only do what is async-signal-safe. It makes one
    // system call for each descriptor and neither allocates nor takes a lock; an error is a number.
    unsafe { command.pre_exec(clear) };
}

/// Makes the child of `command` the leader of a session of its own: no terminal's Ctrl-C, and no
/// signal to this process's group, reaches it.
#[cfg(feature = "net")]
pub(crate) fn own_session(command: &mut Command) {
    let leave = || Ok(rustix::process::setsid().map(drop)?);
    // SAFETY: between fork and exec the closure may only do what is async-signal-safe. It makes one
    // system call and neither allocates nor takes a lock; an error is a number.
    unsafe { command.pre_exec(leave) };
}
