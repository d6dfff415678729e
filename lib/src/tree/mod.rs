//! A process tree from outside: which processes it is, how it is held, made whole, ended.
//!
//! - [`Tree`] and [`Process`] tell processes from others that got their pids later.
//! - [`fence`] holds a tree still by the kernel's freezer, so that nothing but the fence's opening lets it run.
//! - [`hold`] stops a tree when CRIU dies, or before.
//! - [`heal`] undoes what a CRIU that was killed left in a tree: sockets in repair mode, a network lock.
//! - [`copy`] finds out whether a restored tree runs, and removes what a restore left.

mod cgroup;
pub mod copy;
pub mod fence;
pub mod heal;
pub mod hold;
mod identity;
mod network;
#[cfg(test)]
mod testing;

use std::time::{Duration, Instant};

pub use cgroup::Freezer;
pub use fence::{Fence, FenceError};
pub use heal::Healed;
pub use identity::{Process, Tree, boot_id};

/// Waits until `condition` holds; false where that takes longer than `limit`.
#[expect(
    clippy::disallowed_methods,
    reason = "a driver: it waits for the kernel and other processes"
)]
pub(crate) fn within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    // What is waited for mostly takes less than a millisecond, and is part of a downtime.
    let mut pause = Duration::from_micros(50);
    loop {
        if condition() {
            return true;
        }
        if begun.elapsed() >= limit {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}
