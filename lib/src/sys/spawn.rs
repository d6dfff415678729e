//! Child processes that get descriptors of ours.

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
