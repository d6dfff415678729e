//! Content digests: what every page and file is known by.

use std::fmt;

/// BLAKE3 digest of a block of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// The first 16 hexadecimal digits: enough for logs and messages.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The digest of `block_len` zero bytes.
pub fn zero_digest(block_len: usize) -> Digest {
    Digest::of(&vec![0; block_len])
}

/// Appends the digests of `data` cut into blocks of `block_len` bytes; the last may be shorter.
pub fn hash_blocks(data: &[u8], block_len: usize, out: &mut Vec<Digest>) {
    out.extend(data.chunks(block_len).map(Digest::of));
}

/// Digests above those of blocks.
pub mod tree {
    use super::Digest;

    /// The digest of consecutive blocks with the digests `blocks`.
    pub fn segment_digest(blocks: &[Digest]) -> Digest {
        let mut hasher = blake3::Hasher::new_derive_key("crxfer 2026 segment v1");
        blocks.iter().for_each(|digest| { hasher.update(&digest.0); });
        Digest(*hasher.finalize().as_bytes())
    }

    /// The digest of a whole file.
    pub fn file_digest(size: u64, block_len: u64, segments: &[Digest]) -> Digest {
        let mut hasher = blake3::Hasher::new_derive_key("crxfer 2026 file v1");
        hasher.update(&size.to_le_bytes());
        hasher.update(&block_len.to_le_bytes());
        segments.iter().for_each(|digest| { hasher.update(&digest.0); });
        Digest(*hasher.finalize().as_bytes())
    }
}
