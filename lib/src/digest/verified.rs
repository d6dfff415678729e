//! Bytes that are known to be what a digest says.
//!
//! Everything that stores or publishes content takes one of these types and nothing else, so the
//! check cannot be left out: there is no way to make one except by hashing the bytes.

use bytes::Bytes;

use super::{Digest, hash_blocks};

/// Bytes that do not have the digest they were announced with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("content has digest {found}, announced was {expected}")]
pub struct Mismatch {
    /// What was announced.
    pub expected: Digest,
    /// What the bytes have.
    pub found: Digest,
}

/// The first block of a run that does not have the digest it was announced with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("block {index} of the run has digest {found}, announced was {expected}")]
pub struct MismatchAt {
    /// Which block of the run, from 0.
    pub index: usize,
    /// What was announced.
    pub expected: Digest,
    /// What the bytes have.
    pub found: Digest,
}

/// Why a run of blocks is not what it was announced as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunMismatch {
    /// More or fewer bytes than the announced digests are for.
    #[error("{blocks} blocks arrived, digests were announced for {digests}")]
    Count {
        /// Blocks that the bytes make.
        blocks: usize,
        /// Digests announced.
        digests: usize,
    },
    /// A block with other content.
    #[error(transparent)]
    Block(#[from] MismatchAt),
}

/// Bytes with a digest that was computed from them.
#[derive(Clone, Debug)]
pub struct Verified {
    bytes: Bytes,
    digest: Digest,
}

impl Verified {
    /// Takes `bytes` if their digest is `expected`.
    pub fn check(bytes: Bytes, expected: &Digest) -> Result<Self, Mismatch> {
        let verified = Self::hash(bytes);
        if verified.digest != *expected {
            return Err(Mismatch {
                expected: *expected,
                found: verified.digest,
            });
        }
        Ok(verified)
    }

    /// Takes `bytes` of one's own, which have whatever digest they have.
    pub fn hash(bytes: Bytes) -> Self {
        let digest = Digest::of(&bytes);
        Self { bytes, digest }
    }

    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The bytes, given up as a plain buffer.
    pub fn into_bytes(self) -> Bytes {
        self.bytes
    }

    /// Their digest.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }
}

/// A run of blocks with the digests that were computed from them.
///
/// All blocks have the same length except the last, which may be shorter (the end of a file).
#[derive(Clone, Debug)]
pub struct VerifiedRun {
    bytes: Bytes,
    block_len: usize,
    digests: Vec<Digest>,
}

impl VerifiedRun {
    /// Takes `bytes` if they are blocks of `block_len` bytes with exactly these digests.
    ///
    /// # Panics
    ///
    /// If `block_len` is 0.
    pub fn check(bytes: Bytes, block_len: usize, expected: &[Digest]) -> Result<Self, RunMismatch> {
        assert!(block_len > 0, "a block has at least one byte");
        let blocks = bytes.len().div_ceil(block_len);
        // Before hashing: a peer that sends too much is not worth the time.
        if blocks != expected.len() {
            return Err(RunMismatch::Count {
                blocks,
                digests: expected.len(),
            });
        }
        let run = Self::hash(bytes, block_len);
        match first_difference(&run.digests, expected) {
            Some(mismatch) => Err(mismatch.into()),
            None => Ok(run),
        }
    }

    /// Takes `bytes` of one's own, which have whatever digests they have.
    ///
    /// # Panics
    ///
    /// If `block_len` is 0.
    pub fn hash(bytes: Bytes, block_len: usize) -> Self {
        let mut digests = Vec::new();
        hash_blocks(&bytes, block_len, &mut digests);
        Self {
            bytes,
            block_len,
            digests,
        }
    }

    /// All bytes of the run.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The bytes, given up as a plain buffer.
    pub fn into_bytes(self) -> Bytes {
        self.bytes
    }

    /// Length of every block but perhaps the last.
    pub fn block_len(&self) -> usize {
        self.block_len
    }

    /// The digest of each block.
    pub fn digests(&self) -> &[Digest] {
        &self.digests
    }

    /// Each block with its digest, in order.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = (&[u8], &Digest)> {
        self.bytes.chunks(self.block_len).zip(&self.digests)
    }

    /// Block `index` as bytes of its own, sharing this run's buffer.
    pub fn block(&self, index: usize) -> Option<Verified> {
        let digest = *self.digests.get(index)?;
        let start = index * self.block_len;
        let end = self.bytes.len().min(start + self.block_len);
        Some(Verified {
            bytes: self.bytes.slice(start..end),
            digest,
        })
    }
}

fn first_difference(found: &[Digest], expected: &[Digest]) -> Option<MismatchAt> {
    let index = found.iter().zip(expected).position(|(a, b)| a != b)?;
    Some(MismatchAt {
        index,
        expected: expected[index],
        found: found[index],
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::noise;
    use super::*;

    fn run_of(len: usize) -> (Bytes, Vec<Digest>) {
        let bytes = Bytes::from(noise(len, 3));
        let digests = bytes.chunks(4096).map(Digest::of).collect();
        (bytes, digests)
    }

    #[test]
    fn one_flipped_bit_is_refused() {
        let digest = Digest::of(b"page");
        let verified = Verified::check(Bytes::from_static(b"page"), &digest).unwrap();
        assert_eq!(verified.digest(), &digest);
        assert_eq!(&verified.into_bytes()[..], b"page");
        let refused = Verified::check(Bytes::from_static(b"pagd"), &digest).unwrap_err();
        assert_eq!(refused.expected, digest);
        assert_eq!(refused.found, Digest::of(b"pagd"));
    }

    #[test]
    fn run_is_refused_at_its_first_wrong_block() {
        let (bytes, mut digests) = run_of(20 * 4096 + 100);
        let run = VerifiedRun::check(bytes.clone(), 4096, &digests).unwrap();
        assert_eq!(run.digests(), digests);
        digests[20] = Digest([0; 32]);
        digests[13] = Digest([0; 32]);
        let Err(RunMismatch::Block(at)) = VerifiedRun::check(bytes, 4096, &digests) else {
            panic!("a wrong block was taken");
        };
        assert_eq!((at.index, at.expected), (13, Digest([0; 32])));
    }

    #[test]
    fn run_of_another_length_is_refused() {
        let (bytes, digests) = run_of(3 * 4096);
        for wrong in [&digests[..2], &[digests.clone(), vec![digests[0]]].concat()] {
            let refused = VerifiedRun::check(bytes.clone(), 4096, wrong).unwrap_err();
            assert_eq!(
                refused,
                RunMismatch::Count {
                    blocks: 3,
                    digests: wrong.len()
                }
            );
        }
        let short = VerifiedRun::check(bytes.slice(..3 * 4096 - 1), 4096, &digests);
        assert!(matches!(short, Err(RunMismatch::Block(at)) if at.index == 2));
    }

    #[test]
    fn blocks_of_a_run_keep_their_digests() {
        let (bytes, digests) = run_of(2 * 4096 + 7);
        let run = VerifiedRun::hash(bytes.clone(), 4096);
        let lens: Vec<_> = run.blocks().map(|(block, _)| block.len()).collect();
        assert_eq!(lens, [4096, 4096, 7]);
        let last = run.block(2).unwrap();
        assert_eq!(
            (last.bytes(), last.digest()),
            (&bytes.slice(2 * 4096..), &digests[2])
        );
        assert!(run.block(3).is_none());
    }

    #[test]
    fn empty_run_has_no_blocks() {
        let run = VerifiedRun::check(Bytes::new(), 4096, &[]).unwrap();
        assert_eq!(run.blocks().len(), 0);
    }
}
