//! What can go wrong between CRIU and an image streamer.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::delta::BadName;
use crate::image::ImageError;

/// Why a capture or a serving ended early.
///
/// A dump whose capture ends early fails, and CRIU lets the tree run on.
#[derive(Debug, thiserror::Error)]
pub enum StreamerError {
    /// The operating system refused something.
    #[error("{}: cannot {action} ({source})", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried, as an infinitive.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The directory for the sockets can be entered by others.
    #[error("{}: others may enter this directory, and images are a process's memory; chmod 700 it, or name one that does not exist", .0.display())]
    Public(PathBuf),
    /// CRIU's sockets have addresses of at most 107 bytes.
    #[error("{}: this path is too long for a socket ({} bytes, at most 107); name a shorter directory", .0.display(), .0.as_os_str().len())]
    LongPath(PathBuf),
    /// Another capture or serving has the directory.
    #[error("{}: another crxfer streams by this directory; wait until it has ended, or name another", .0.display())]
    Busy(PathBuf),

    /// A request has a length that none has.
    #[error("CRIU's request {number}: a length of {stated} bytes; this is not CRIU's protocol")]
    Length {
        /// Which request.
        number: u64,
        /// The length that it states, in bytes.
        stated: u32,
    },
    /// A request is not the message that it should be.
    #[error("CRIU's request {number}: {what}; this is not CRIU's protocol")]
    Request {
        /// Which request.
        number: u64,
        /// What is wrong.
        what: String,
    },
    /// The name of an image is none.
    #[error("CRIU's request {number}: {error}")]
    Name {
        /// Which request.
        number: u64,
        /// What is wrong with the name.
        error: BadName,
    },
    /// An image is dumped a second time.
    #[error("CRIU's request {number}: {name} came before; nothing can be made of that")]
    Twice {
        /// Which request.
        number: u64,
        /// The image.
        name: String,
    },
    /// More images than any dump has.
    #[error("CRIU asked for more than {0} images; that is no dump")]
    TooMany(u64),
    /// The pipe that follows a request is none.
    #[error("CRIU's request for {name}: {what} came where a pipe is due")]
    NoPipe {
        /// The image.
        name: String,
        /// What came instead.
        what: &'static str,
    },
    /// CRIU closed its socket in the middle of a request.
    #[error("CRIU ended in the middle of its request {number}")]
    CutShort {
        /// Which request.
        number: u64,
    },
    /// CRIU said nothing for too long.
    #[error("CRIU sent nothing for {} s; its dump is given up, and the tree runs on", .0.as_secs())]
    Silent(Duration),
    /// CRIU announced itself by its action script and then did not connect.
    #[error("CRIU's action script announced a dump, but CRIU did not connect within {} s; look into CRIU's log", .0.as_secs())]
    NotConnected(Duration),
    /// The dump ended without a vote: it failed, or its action script at post-dump did.
    #[error("CRIU ended its dump before post-dump; the tree runs on. Look into CRIU's log")]
    NoVote,
    /// The caller gave up.
    #[error("stopped")]
    Stopped,
    /// There is no room for the images.
    #[error("no room for {name} after {taken} bytes of images; give more with --memory")]
    Full {
        /// The image that did not fit.
        name: String,
        /// Bytes of all images so far.
        taken: u64,
    },

    /// A set cannot be read, or cannot be restored.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A set that CRIU could not restore.
    #[error("{}: {what}; CRIU could not restore it", directory.display())]
    Incomplete {
        /// The set.
        directory: PathBuf,
        /// What it is instead of complete.
        what: String,
    },

    /// Nobody captures there.
    #[error("{}: no `crxfer stream capture` listens there", .0.display())]
    NoCapture(PathBuf),
    /// The capture ended before it gave a verdict.
    #[error("the capture has ended without a verdict")]
    NoVerdict,
    /// The capture wants the tree to run on.
    #[error("refused: {0}")]
    Refused(String),
}

impl StreamerError {
    /// For `map_err`: an [`StreamerError::Io`] about `path`.
    pub(super) fn io<E: Into<io::Error>>(
        path: &Path,
        action: &'static str,
    ) -> impl FnOnce(E) -> Self + use<E> {
        let path = path.to_owned();
        move |error| Self::Io {
            path,
            action,
            source: error.into(),
        }
    }
}
