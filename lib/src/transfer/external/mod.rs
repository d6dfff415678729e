//! Somebody else's CRIU: a command that dumps, or restores, in the place of a CRIU of our own.
//!
//! Container runtimes start CRIU themselves, with options that only they know. What remains is to hear
//! of its stages and to answer them, which CRIU's action scripts are for:
//!
//! ```text
//!  crxfer migrate ── sh -c COMMAND ── runc checkpoint ── criu ── sh ── crxfer action
//!       ▲  ▲                                               │             │
//!       │  └── memory: TCP to 127.0.0.1, or files ─────────┘             │
//!       └───── stage, CRIU's pid, the root's pid; go on, or fail ────────┘
//! ```
//!
//! - [`action`]: that last line, both ends of it.
//! - `command`: the command, from its start to its end.
//! - `memory`: where its memory comes from.
//! - `scripts`: where the script is that CRIU runs.

pub mod action;
pub(in crate::transfer) mod command;
pub(in crate::transfer) mod memory;
pub(in crate::transfer) mod scripts;

#[cfg(test)]
mod tests;
