//! Digests of many blocks at once, at BLAKE3's rate on long inputs.
//!
//! BLAKE3 cuts its input into chunks of 1 KiB, compresses them independently (as many side by side
//! as the CPU has vector lanes for) and joins the results in a binary tree. A page of 4 KiB is four
//! chunks: hashed alone it fills 4 of AVX-512's 16 lanes, and its three parent nodes fill one or
//! two. Here the lanes are filled across blocks: chunk *i* of 16 blocks in one call, and then the
//! parent nodes of the whole group, one level in one call.
//!
//! This uses the platform layer that the blake3 crate hides from its documentation, hence the exact
//! version in Cargo.toml; a test holds every digest against `blake3::hash`, which also takes over
//! wherever this path does not apply (no vector unit, block lengths that are not 2 to 64 chunks,
//! the few blocks that fill no lanes).

use blake3::IncrementCounter;
use blake3::platform::Platform;

use super::Digest;

/// Bytes of one BLAKE3 chunk, the leaf of its tree.
const CHUNK_LEN: usize = 1024;

/// Most lanes of any vector unit that the blake3 crate knows (AVX-512).
const MAX_LANES: usize = 16;

/// Chunks whose chaining values are held at once, if that many blocks fill the lanes: 64 pages of
/// 4 KiB, whose parent levels then have 128, 64 nodes. The values (8 KiB) stay near the core.
const GROUP_CHUNKS: usize = 256;

/// Longest block hashed here (64 KiB, the largest base page of any architecture). Longer blocks
/// fill the lanes well by themselves, and 16 of them are rarely at hand.
const MAX_BLOCK_CHUNKS: usize = 64;

// Domain flags and initial chaining value, as the BLAKE3 paper (section 2.2) gives them.
const FLAG_CHUNK_START: u8 = 1;
const FLAG_CHUNK_END: u8 = 1 << 1;
const FLAG_PARENT: u8 = 1 << 2;
const FLAG_ROOT: u8 = 1 << 3;
const INITIAL_VALUE: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

type ChainingValue = [u8; 32];
type Chunk = [u8; CHUNK_LEN];

/// Appends the digest of each block of `data`, whose length is a multiple of `block_len`.
pub(super) fn hash_whole_blocks(data: &[u8], block_len: usize, out: &mut Vec<Digest>) {
    let batched = match Batch::new(block_len) {
        Some(batch) => batch.hash_blocks(data, out),
        None => 0,
    };
    out.extend(data[batched..].chunks(block_len).map(Digest::of));
}

/// How blocks of one length are laid into the lanes of this CPU.
struct Batch {
    platform: Platform,
    lanes: usize,
    /// Chunks of a block: a power of two from 2 to [`MAX_BLOCK_CHUNKS`].
    chunks: usize,
}

/// Chaining values of one level and of the next, kept from group to group.
#[derive(Default)]
struct Scratch {
    values: Vec<ChainingValue>,
    parents: Vec<ChainingValue>,
}

impl Batch {
    /// `None` where the public function is the better or the only way.
    fn new(block_len: usize) -> Option<Self> {
        let platform = Platform::detect();
        let lanes = platform.simd_degree().min(MAX_LANES);
        let chunks = block_len / CHUNK_LEN;
        let applies =
            lanes > 1 && block_len.is_power_of_two() && (2..=MAX_BLOCK_CHUNKS).contains(&chunks);
        applies.then_some(Self {
            platform,
            lanes,
            chunks,
        })
    }

    /// Hashes as many blocks from the front of `data` as fill lanes; returns their bytes.
    fn hash_blocks(&self, data: &[u8], out: &mut Vec<Digest>) -> usize {
        let block_len = self.chunks * CHUNK_LEN;
        let blocks = data.len() / block_len;
        let batched = (blocks - blocks % self.fewest_blocks()) * block_len;
        let group_blocks = self.lanes.max(GROUP_CHUNKS / self.chunks);
        let mut scratch = Scratch::default();
        for group in data[..batched].chunks(group_blocks * block_len) {
            self.hash_group(group, &mut scratch, out);
        }
        batched
    }

    /// The number of blocks below which a batch gains nothing over one block at a time.
    fn fewest_blocks(&self) -> usize {
        if self.chunks >= self.lanes {
            self.lanes
        } else {
            // The AVX-512 code does eight lanes at a time before it goes one by one.
            self.lanes.min(8)
        }
    }

    fn hash_group(&self, group: &[u8], scratch: &mut Scratch, out: &mut Vec<Digest>) {
        let Scratch { values, parents } = scratch;
        let (chunks, _) = group.as_chunks::<CHUNK_LEN>();
        let roots = chunks.len() / self.chunks;
        values.resize(chunks.len(), [0; 32]);
        self.hash_chunks(chunks, values);
        // Siblings lie side by side, so each level is one pass over pairs, whatever their block.
        while values.len() > roots {
            parents.resize(values.len() / 2, [0; 32]);
            let root_flag = if parents.len() == roots { FLAG_ROOT } else { 0 };
            self.join_pairs(values, FLAG_PARENT | root_flag, parents);
            std::mem::swap(values, parents);
        }
        out.extend(values.iter().copied().map(Digest));
    }

    /// Chunk `i` of as many blocks as there are lanes in one call, for each `i`.
    ///
    /// Blocks that could fill the lanes alone are done this way too: the processor reads ahead in
    /// 16 places a block apart better than in 16 that follow each other (measured with 64 KiB
    /// blocks: 1.13 times as fast).
    fn hash_chunks(&self, chunks: &[Chunk], values: &mut [ChainingValue]) {
        let stripe = self.chunks * self.lanes;
        for (stripe, values) in chunks.chunks(stripe).zip(values.chunks_mut(stripe)) {
            let blocks = stripe.len() / self.chunks;
            for i in 0..self.chunks {
                let inputs: [&Chunk; MAX_LANES] = std::array::from_fn(|lane| {
                    stripe
                        .get(lane * self.chunks + i)
                        .unwrap_or(&[0; CHUNK_LEN])
                });
                let mut lanes = [[0; 32]; MAX_LANES];
                self.hash_leaves(&inputs[..blocks], i as u64, &mut lanes[..blocks]);
                for (lane, value) in lanes[..blocks].iter().enumerate() {
                    values[lane * self.chunks + i] = *value;
                }
            }
        }
    }

    fn hash_leaves(&self, inputs: &[&Chunk], counter: u64, values: &mut [ChainingValue]) {
        self.platform.hash_many(
            inputs,
            &INITIAL_VALUE,
            counter,
            IncrementCounter::No,
            0,
            FLAG_CHUNK_START,
            FLAG_CHUNK_END,
            values.as_flattened_mut(),
        );
    }

    fn join_pairs(&self, values: &[ChainingValue], flags: u8, parents: &mut [ChainingValue]) {
        let (pairs, _) = values.as_flattened().as_chunks::<64>();
        for (pairs, parents) in pairs.chunks(MAX_LANES).zip(parents.chunks_mut(MAX_LANES)) {
            let inputs: [&[u8; 64]; MAX_LANES] =
                std::array::from_fn(|i| pairs.get(i).unwrap_or(&[0; 64]));
            self.platform.hash_many(
                &inputs[..pairs.len()],
                &INITIAL_VALUE,
                0,
                IncrementCounter::No,
                flags,
                0,
                0,
                parents.as_flattened_mut(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::noise;
    use super::*;

    /// Every platform of this CPU, so that the narrower ones are held to the truth as well.
    fn platforms() -> Vec<Platform> {
        let mut platforms = vec![Platform::detect()];
        #[cfg(target_arch = "x86_64")]
        platforms.extend(
            [Platform::sse2(), Platform::sse41(), Platform::avx2()]
                .into_iter()
                .flatten(),
        );
        platforms.retain(|platform| platform.simd_degree() > 1);
        platforms
    }

    fn assert_equal_to_public(batch: &Batch, blocks: usize) {
        let block_len = batch.chunks * CHUNK_LEN;
        let data = noise(block_len * blocks, (block_len + blocks) as u64);
        let mut digests = Vec::new();
        let batched = batch.hash_blocks(&data, &mut digests);
        let expected: Vec<_> = data[..batched].chunks(block_len).map(Digest::of).collect();
        assert_eq!(
            digests, expected,
            "{blocks} blocks of {block_len} on {:?}",
            batch.platform
        );
        assert!(batched / block_len + batch.fewest_blocks() > blocks);
    }

    #[test]
    fn every_platform_and_block_length_equals_the_public_function() {
        for platform in platforms() {
            for chunks in [2, 4, 8, 16, 32, 64] {
                let batch = Batch {
                    platform,
                    lanes: platform.simd_degree(),
                    chunks,
                };
                for blocks in (0..20).chain([31, 32, 33, 63, 64, 65, 130]) {
                    assert_equal_to_public(&batch, blocks);
                }
            }
        }
    }

    #[test]
    fn lengths_that_do_not_halve_into_chunks_take_the_public_function() {
        for block_len in [1, 512, 1024, 3 * 1024, 4095, 4097, 6144, 128 << 10] {
            assert!(Batch::new(block_len).is_none(), "{block_len}");
            let data = noise(block_len * 9, 1);
            let mut digests = Vec::new();
            hash_whole_blocks(&data, block_len, &mut digests);
            let expected: Vec<_> = data.chunks(block_len).map(Digest::of).collect();
            assert_eq!(digests, expected);
        }
    }
}
