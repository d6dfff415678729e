//! Other processes' network namespaces.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Names the network namespace of process `pid`; `None` where it cannot be seen.
pub(super) fn name_of(pid: u32) -> Option<u64> {
    let space = std::fs::metadata(format!("/proc/{pid}/ns/net"));
    space.ok().map(|space| space.ino())
}

/// Names this thread's.
pub(super) fn own_name() -> Option<u64> {
    let space = std::fs::metadata("/proc/thread-self/ns/net");
    space.ok().map(|space| space.ino())
}

/// Does `run` in the network namespace of process `pid`: commands that it starts are there too.
pub(super) fn inside<T: Send>(pid: u32, run: impl FnOnce() -> T + Send) -> io::Result<T> {
    let space = File::open(format!("/proc/{pid}/ns/net"))?;
    if own_name() == Some(space.metadata()?.ino()) {
        return Ok(run());
    }
    // A thread of its own, because it could not come back without privileges.
    std::thread::scope(|scope| {
        let inside = std::thread::Builder::new().spawn_scoped(scope, || {
            move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(run())
        })?;
        let result = inside.join();
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
