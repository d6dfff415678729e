//! An image streamer: the program that CRIU gives all images to with `criu dump --stream`, and takes
//! them from with `criu restore --stream`.
//!
//! ```text
//!   criu dump --stream -D DIR                     criu restore --stream -D DIR
//!     │ request: name      DIR/streamer-            │ request: name      DIR/streamer-
//!     ▼                    capture.sock             ▼                    serve.sock
//!   Capture                                       Serve ── reply: exists or not ──▶ criu
//!     │ ◀── read end of a pipe (SCM_RIGHTS)         │ ◀── write end of a pipe (SCM_RIGHTS)
//!     │ ◀══ the image, until its end                │ ══▶ the image, then its end
//!     ▼                                             ▲
//!   a directory, usually in no visible file system  image::FlatView of any set
//! ```
//!
//! - [`Requests`] is the framing of both dialogues as a state machine without I/O.
//! - [`Capture`] takes one dump. CRIU writes several images by turns, so all pipes are drained at once.
//! - [`Serve`] gives one restore what it asks for.
//! - [`vote`]: the dialogue between a capture and the action script that holds CRIU at post-dump. The
//!   protocol itself has no word for success: CRIU closes its socket after the tree was resumed or
//!   killed, in both cases alike.
//!
//! Everything blocks and needs no runtime.

mod capture;
mod error;
mod framing;
mod serve;
mod socket;
#[cfg(test)]
mod tests;
pub mod vote;

pub use capture::{Capture, CaptureOptions, Captured};
pub use error::StreamerError;
pub use framing::{MAX_IMAGES, MAX_REQUEST_BYTES, Requests, Role, Want, encode_request};
pub use serve::{Serve, Served};
pub use socket::Stopper;
pub use vote::Vote;

/// Largest size asked for a pipe, in bytes: what CRIU writes ahead while others are drained. The
/// kernel's own 64 KiB make CRIU wait for us at every 16 pages.
const PIPE_BYTES: usize = 4 << 20;

/// The same where this process may not exceed the kernel's usual maximum.
const UNPRIVILEGED_PIPE_BYTES: usize = 1 << 20;

/// Makes `pipe` as large as it may be; that it stays small is no error.
fn enlarge(pipe: impl std::os::fd::AsFd) {
    if rustix::pipe::fcntl_setpipe_size(&pipe, PIPE_BYTES).is_err() {
        let _ = rustix::pipe::fcntl_setpipe_size(&pipe, UNPRIVILEGED_PIPE_BYTES);
    }
}
