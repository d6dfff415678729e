//! Content digests: what every block, segment and file is known by.
//!
//! A *block* is the unit of comparison: one page of a pages file, or a piece of fixed length of any
//! other file (the last one may be shorter). Blocks are named by plain BLAKE3, so any tool can
//! check one; the tree over them is in [`tree`]. Bytes that came from elsewhere become usable by
//! being checked against a digest, which is what [`Verified`] and [`VerifiedRun`] stand for.

use std::fmt;
use std::sync::OnceLock;

mod batch;
pub mod tree;
mod verified;

pub use verified::{Mismatch, MismatchAt, RunMismatch, Verified, VerifiedRun};

/// BLAKE3 digest of a block of bytes.
///
/// Comparing digests takes time that depends on them: they name content and are no secret.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Length of a digest in bytes, in memory and on the wire.
    pub const LEN: usize = 32;

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The digest whose bytes are `bytes`, as read from the wire or from an index.
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// The bytes of the digest.
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
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
        write_hex(&self.0[..8], f)
    }
}

/// All 64 hexadecimal digits, as `b3sum` prints them.
impl fmt::LowerHex for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// Appends to `out` the digest of each block of `data`: blocks of `block_len` bytes, the last one
/// shorter when the length is no multiple. Empty data has no blocks.
///
/// Each digest equals [`Digest::of`] of that block; taking many blocks in one call is what makes
/// short blocks as fast as long inputs (see `batch`). A MiB at a time is plenty.
///
/// # Panics
///
/// If `block_len` is 0.
pub fn hash_blocks(data: &[u8], block_len: usize, out: &mut Vec<Digest>) {
    assert!(block_len > 0, "a block has at least one byte");
    out.reserve(data.len().div_ceil(block_len));
    let (whole, last) = data.split_at(data.len() - data.len() % block_len);
    batch::hash_whole_blocks(whole, block_len, out);
    if !last.is_empty() {
        out.push(Digest::of(last));
    }
}

/// Whether every byte of `data` is zero; true for empty data.
///
/// Content that is not zero is usually told from its first bytes; a page that is zero costs one
/// read of it.
pub fn is_zero(data: &[u8]) -> bool {
    // 128 bytes at a time without a branch inside: the compiler turns this into vector ORs.
    let (blocks, rest) = data.as_chunks::<128>();
    blocks.iter().all(|block| or_all(block) == 0) && or_all(rest) == 0
}

fn or_all(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |all, byte| all | byte)
}

/// The digest of `block_len` zero bytes, by which a zero block is recognised without its bytes.
///
/// Computed once for each power of two up to 2 MiB (every page size there is), anew for others.
pub fn zero_digest(block_len: usize) -> Digest {
    const CACHED: usize = 22;
    static ZERO_DIGESTS: [OnceLock<Digest>; CACHED] = [const { OnceLock::new() }; CACHED];

    let shift = block_len.trailing_zeros() as usize;
    match ZERO_DIGESTS.get(shift) {
        Some(cached) if block_len.is_power_of_two() => {
            *cached.get_or_init(|| hash_zeros(block_len))
        }
        _ => hash_zeros(block_len),
    }
}

fn hash_zeros(len: usize) -> Digest {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut hasher = blake3::Hasher::new();
    for _ in 0..len / ZEROS.len() {
        hasher.update(&ZEROS);
    }
    hasher.update(&ZEROS[..len % ZEROS.len()]);
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `len` bytes without a period that a block length could hide.
    pub(super) fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut reader = blake3::Hasher::new()
            .update(&seed.to_le_bytes())
            .finalize_xof();
        reader.fill(&mut bytes);
        bytes
    }

    #[test]
    fn digests_print_short_and_in_full() {
        let digest = Digest::of(b"");
        let full = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(format!("{digest:x}"), full);
        assert_eq!(digest.to_string(), full[..16]);
        assert_eq!(
            format!("{digest:?}"),
            format!("Digest({})", full.get(..16).unwrap())
        );
        assert_eq!(Digest::from_bytes(*digest.as_bytes()), digest);
    }

    #[test]
    fn blocks_have_the_digests_of_the_public_function() {
        for block_len in [1, 1024, 1536, 4096, 16384, 65536] {
            for blocks in [0, 1, 7, 17] {
                for extra in [0, 1, block_len - 1] {
                    let data = noise(block_len * blocks + extra, blocks as u64);
                    let mut digests = vec![Digest([7; 32])];
                    hash_blocks(&data, block_len, &mut digests);
                    let mut expected = vec![Digest([7; 32])];
                    expected.extend(data.chunks(block_len).map(Digest::of));
                    assert_eq!(
                        digests, expected,
                        "{blocks} blocks of {block_len} and {extra} bytes"
                    );
                }
            }
        }
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        for len in [0, 1, 127, 128, 129, 4096, 5000] {
            let mut data = vec![0; len];
            assert!(is_zero(&data));
            for at in 0..len {
                data[at] = 0x80;
                assert!(!is_zero(&data), "byte {at} of {len}");
                data[at] = 0;
            }
        }
    }

    #[test]
    fn zero_digests_are_those_of_zero_bytes() {
        for len in [0, 1, 100, 4096, 4097, 16384, 65536, 2 << 20, 4 << 20] {
            let expected = Digest::of(&vec![0; len]);
            assert_eq!(zero_digest(len), expected);
            assert_eq!(zero_digest(len), expected, "from the cache");
        }
    }
}
