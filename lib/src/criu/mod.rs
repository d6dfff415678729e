//! Driving CRIU, and the sockets that CRIU itself speaks on.
//!
//! ```text
//!   caller ── Worker ── SOCK_SEQPACKET ── criu swrk ── dumps or restores the tree
//!                │  DUMP, RESTORE ▶            │
//!                │  ◀ post-dump, …             │ page-server stream over a UNIX socket
//!                │  go on / refuse ▶           ▼
//!                          page_client::serve ── PageServer ── PageSink: memory, page by page
//! ```
//!
//! - [`Worker`] is one `criu swrk`: start it, [probe](Worker::probe) it, then give it one dump,
//!   pre-dump or restore. At each [`Stage`] the caller decides whether CRIU goes on.
//! - [`causes`] turns CRIU's own words into a sentence that says what to do.
//! - [`page_server`] is the protocol in which CRIU sends memory, as a state machine without I/O;
//!   [`page_client`] reads it from a socket and hands the pages to a [`page_client::PageSink`].
//! - [`endpoint`] is where CRIUs that somebody else starts connect to: a port, or a socket for many dumps.
//! - [`page_feed`] is the other way round: the pages of a set go to a real `criu page-server`.
//! - [`streamer`] is an image streamer: takes all images of a dump through pipes, and gives them to a
//!   restore.
//! - [`network_lock`] removes the firewall rules that CRIU leaves behind.
//!
//! Everything blocks and needs no runtime: one plain thread for a worker, one for its memory.
//! Nothing here looks into images, knows the peer host, or decides when to freeze.

pub mod causes;
pub mod endpoint;
mod error;
mod log;
pub mod network_lock;
pub mod options;
pub mod page_client;
pub mod page_feed;
pub mod page_server;
mod process;
pub mod rpc;
mod stage;
pub mod streamer;
#[cfg(test)]
pub(crate) mod testing;

pub use error::{CriuError, Failure, Operation};
pub use options::{
    CgroupMode, CriuOptions, DumpOptions, Leave, NetworkLock, PreDumpOptions, RestoreOptions,
};
pub use process::Canceller;
pub use rpc::{DumpOutcome, Probe, Restored, Worker};
pub use stage::{Stage, Verdict};
