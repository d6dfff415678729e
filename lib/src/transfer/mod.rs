//! The drivers: tasks, sockets, files and the clock around the session, the store and the images.
//!
//! [`send`] moves one image directory, with what it builds on, to where a [`Receiver`] waits.

mod assemble;
mod chain;
mod clock;
mod costs;
mod error;
mod event;
pub mod external;
mod files;
pub mod finish;
pub mod guard;
mod memo;
pub mod migrate;
mod pack;
pub mod pages;
mod pause;
mod plan;
mod recv;
mod send;
mod stream_capture;

pub use error::TransferError;
pub use event::{Event, Events, Received};
pub use recv::{ReceiveOptions, Receiver, RestoreHost};
pub use send::{SendOptions, SendReport, Target, send};
pub use stream_capture::{StreamError, StreamMoment, StreamOptions, StreamReport, stream_capture};

/// Name and version of this program, as told to the peer.
pub(crate) fn software() -> String {
    concat!("crxfer ", env!("CARGO_PKG_VERSION")).to_owned()
}
