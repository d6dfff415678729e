//! Checkpoints of containers as podman, CRI-O and containerd export them: one archive, in which most
//! bytes are CRIU's images.
//!
//! ```text
//!   ctr.tar.zst                              DIR/
//!     checkpoint/pages-1.img …        ⇄        pages-1.img …        what `crxfer send` de-duplicates
//!     config.dump, spec.dump,         ⇄        archive-rest.tar     all other members, as they were
//!     rootfs-diff.tar, …
//! ```
//!
//! [`unpack`] makes an image directory of an archive, [`pack`] an archive of such a directory in any
//! layout, parents included. Members that are not images are carried byte for byte, with their headers.
//!
//! An archive may come from anywhere: names are single components beneath one directory, nothing but
//! files and directories is taken, and all that is unpacked is counted. The podman that restores it
//! must still trust it: an image is code.

mod error;
mod members;
mod pack;
#[cfg(test)]
mod tests;
mod unpack;

pub use error::ArchiveError;
pub use pack::{Compression, Packed, pack};
pub use unpack::{Unpacked, unpack};

/// The member of an image directory that has all other members of its archive.
pub const REST: &str = "archive-rest.tar";

/// Directories of an archive that CRIU's images are in: of a checkpoint, and of the one before.
const IMAGES: [&str; 2] = ["checkpoint", "pre-checkpoint"];
