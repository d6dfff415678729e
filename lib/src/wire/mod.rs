//! What crosses the wire: control messages, frames of blocks, and the limits on both.
//!
//! Bytes from the peer become types that cannot be wrong here; nothing below sees a generated type.

mod frame;
pub mod limits;
mod message;
mod migration;
mod pages;

pub use frame::{
    Codec, FrameError, FrameHeader, HEADER_LEN, Op, decode_ops, decode_page_ops, encode_ops,
};
pub use message::{
    BeginSet, Failure, FailureCode, Hello, Layout, Message, Published, SegmentAt, Welcome,
    WireError,
};
pub use migration::{
    Answer, Keeping, MigrationId, Object, Offer, Offered, Phase, RECORD_HEADER_LEN, RecordKind,
    RestoreOptions, Step, StreamNote, Verdict,
};

pub use pages::{
    Generation, HeldRun, PagesHeld, PagesOffer, PagesOffered, PagesStep, PagesStored, held_messages,
};

use crate::digest::Digest;

/// The versions of the session protocol that this build speaks, highest last.
pub const VERSIONS: std::ops::RangeInclusive<u32> = 1..=3;

/// The first version that knows live migration. Sets and migrations need nothing later.
pub const MIGRATION_VERSION: u32 = 2;

/// The first version that knows page sessions.
pub const PAGES_VERSION: u32 = 3;

/// The short id by which blocks are asked for: the first 16 bytes of the digest.
///
/// Half the bytes of a digest; finding two pages with the same id takes 2^64 tries, and the
/// file digests are over whole digests, so that such a pair ends in an error, not in wrong memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockId(pub [u8; 16]);

impl BlockId {
    /// Length in bytes.
    pub const LEN: usize = 16;

    /// The id of the block with the digest `digest`.
    pub fn of(digest: &Digest) -> Self {
        let mut id = [0; Self::LEN];
        id.copy_from_slice(&digest.0[..Self::LEN]);
        Self(id)
    }

    /// A digest of which only the id is known yet; the rest is zero.
    pub(crate) fn as_prefix(self) -> Digest {
        let mut digest = [0; 32];
        digest[..Self::LEN].copy_from_slice(&self.0);
        Digest(digest)
    }

    /// Eight of its bytes: as good as random.
    pub(crate) fn hash(self) -> u64 {
        u64::from_le_bytes(self.0[..8].try_into().expect("eight bytes"))
    }
}
