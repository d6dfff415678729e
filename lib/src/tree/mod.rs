//! A process tree from outside: which processes it is, how it is held, made whole, ended.
//!
//! - [`Tree`] and [`Process`] tell processes from others that got their pids later.
//! - [`fence`] holds a tree still by the kernel's freezer, so that nothing but the fence's opening lets it run.
//! - [`heal`] undoes what a CRIU that was killed left in a tree: sockets in repair mode, a network lock.
//! - [`copy`] finds out whether a restored tree runs, and removes what a restore left.

pub mod copy;
pub mod fence;
pub mod heal;
mod identity;

pub use fence::{Fence, FenceError};
pub use heal::Healed;
pub use identity::{Process, Tree, boot_id};
