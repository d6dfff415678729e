//! What can be wrong with an archive.

use std::io;
use std::path::{Path, PathBuf};

use crate::image::ImageError;

/// Why an archive cannot be unpacked, or not be made.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The operating system refused something.
    #[error("{}: cannot {action} ({source})", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried, as an infinitive.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The image directory.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The archive cannot be read on.
    #[error("{}: at byte {at} (unpacked): {what}; the archive is damaged", archive.display())]
    Damaged {
        /// The archive.
        archive: PathBuf,
        /// Where, in bytes of the archive without its compression.
        at: u64,
        /// What is wrong.
        what: String,
    },
    /// The archive has something that no checkpoint has.
    #[error("{}: {member:?} {what}; no checkpoint has such a member, and it is refused", archive.display())]
    Refused {
        /// The archive.
        archive: PathBuf,
        /// The member's name.
        member: String,
        /// Why.
        what: &'static str,
    },
    /// The archive holds more than it may.
    #[error("{}: more than {limit} bytes when unpacked; allow more with --max-bytes", archive.display())]
    TooLarge {
        /// The archive.
        archive: PathBuf,
        /// What is allowed, in bytes.
        limit: u64,
    },
    /// There are no images in it.
    #[error("{}: has no images in checkpoint/ or pre-checkpoint/; is it a container's checkpoint?", .0.display())]
    NoImages(PathBuf),
    /// The directory was not made of an archive.
    #[error("{}: has no {}; only what `crxfer archive unpack` made can be packed", .0.display(), super::REST)]
    NoRest(PathBuf),
    /// The result exists already.
    #[error("{}: exists already; give a name that does not, or remove it", .0.display())]
    Exists(PathBuf),
}

impl ArchiveError {
    /// For `map_err`: an [`ArchiveError::Io`] about `path`.
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
